"""What each kernel of a device must move and compute at the sizes of SD3.5-medium: one list for the floors (cuda_static.py) and for the
rates that are measured (cuda.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

TEXT = 333  # 77 CLIP and 256 T5 tokens


@dataclass(frozen=True)
class Sizes:
    """One picture of 1024 x 1024 by default."""

    tokens: int = 4096
    text: int = TEXT
    width: int = 1536
    heads: int = 24
    parameters: int = 2_240_000_000
    latent: int = 128  # side; 16 channels, patches of 2 x 2
    head: tuple[int, int, int] = (64, 64, 9)  # channels, side, kernel of a discriminator head
    decoder: tuple[int, int] = (128, 1024)  # channels, side of the decoder's last layers
    middle: tuple[int, int] = (512, 128)  # channels, side of the decoder's attention
    element: int = 2  # bytes


TINY = Sizes(16, 5, 32, 2, 4096, 8, (8, 4, 3), (8, 8), (16, 4))


@dataclass(frozen=True)
class Work:
    """Each input read once and each result written once."""

    name: str  # of the function, in ladd._core
    size: str
    moved: float  # bytes
    operations: float
    kernels: str  # names of the compiled kernels that do it; "cuBLASLt" is not ours


def works(s: Sizes = Sizes()) -> list[Work]:
    return list(_works(s))


def _works(s: Sizes) -> Iterator[Work]:
    n, d, e = s.tokens, s.width, s.element
    x, joint, dh = n * d * e, n + s.text, d // s.heads
    rows, heads = f"[{n},{d}]", f"{joint} tokens, {s.heads} heads of {dh}"
    qkvo, pairs = joint * d * e, 1.0 * joint * joint * d
    yield Work("linear_forward", f"{rows} -> {3 * d}", 4 * x + 3 * d * d * e, 6.0 * n * d * d, "cuBLASLt linear_finish_kernel")
    yield Work("linear_gelu_forward", f"{rows} -> {4 * d}", 9 * x + 4 * d * d * e, 8.0 * n * d * d, "cuBLASLt")
    yield Work("linear_backward", f"[{n},{4 * d}] -> {d}", 9 * x + 4 * d * d * (e + 8), 16.0 * n * d * d, "cuBLASLt")
    yield Work("linear_backward, dbias", f"[{n},{4 * d}]", 4 * x, 4.0 * n * d, "linear_column_sums_kernel")
    yield Work("attention_forward", heads, 4 * qkvo + 4 * joint * s.heads, 4 * pairs, "attention_forward_mma_kernel")
    yield Work("attention_backward", heads, 8 * qkvo + 4 * joint * s.heads, 10 * pairs, "")
    yield Work("attention_backward, dk and dv", heads, 6 * qkvo, 8 * pairs, "attention_dkdv_kernel")
    yield Work("attention_backward, dq", heads, 5 * qkvo, 6 * pairs, "attention_dq_kernel")
    yield Work("attention_backward, delta", heads, 2 * qkvo, 2.0 * joint * d, "attention_delta_kernel")
    yield Work("attention, streams joined for cuDNN", heads, 8 * qkvo, 0, "attention_move_kernel")
    c, side = s.middle
    yield Work(
        "attention_forward, wide",
        f"{side * side} tokens, 1 head of {c}",
        4.0 * side**2 * c * e,
        4.0 * side**4 * c,
        "attention_forward_wide_kernel",
    )
    yield Work("layer_norm_modulate_forward", rows, 2 * x, 8.0 * n * d, "layer_norm_forward_kernel")
    yield Work("layer_norm_modulate_backward", rows, 4 * x, 14.0 * n * d, "layer_norm_backward_kernel ladd_sum_parts_kernel")
    yield Work("gate_residual_forward", rows, 3 * x, 2.0 * n * d, "gate_forward_kernel")
    yield Work("gate_residual_backward", rows, 3 * x, 3.0 * n * d, "gate_backward_kernel")
    yield Work("rms_norm_heads_forward", f"q of {rows}", 2 * x, 4.0 * n * d, "rms_norm_forward_kernel")
    yield Work("rms_norm_heads_backward", f"q of {rows}", 3 * x, 9.0 * n * d, "rms_norm_backward_kernel")
    yield Work("gelu_forward", f"[{n},{4 * d}]", 8 * x, 40.0 * n * d, "gelu_op")
    yield Work("gelu_backward", f"[{n},{4 * d}]", 12 * x, 80.0 * n * d, "gelu_grad_op")
    yield Work("silu_forward", rows, 2 * x, 4.0 * n * d, "silu_op")
    yield Work("silu_backward", rows, 3 * x, 8.0 * n * d, "silu_grad_op")
    yield Work("add", rows, 3 * x, 1.0 * n * d, "add_op")
    yield Work("axpy", rows, 3 * x, 2.0 * n * d, "axpy_op")
    yield Work("scale", rows, 2 * x, 1.0 * n * d, "scale_op")
    yield Work("add_position", rows, 3 * x, 1.0 * n * d, "add_position_kernel")
    yield Work("timestep_features", "256 numbers", 256 * e, 256 * 60.0, "timestep_features_kernel")
    z = 16 * s.latent**2
    latent = f"[1,16,{s.latent},{s.latent}]"
    yield Work("patch_gather", latent, 2 * z * e, 0, "patch_gather_kernel")
    yield Work("patch_scatter", latent, 2 * z * e, 0, "patch_scatter_kernel")
    yield Work("renoise", latent, 2 * z * e, 40.0 * z, "random_kernel")
    yield Work("interpolate", latent, 3 * z * e, 3.0 * z, "interpolate_op")
    yield Work("predict_x0", latent, 3 * z * e, 2.0 * z, "predict_x0_op")
    yield Work("row_scale", latent, 2 * z * e, 1.0 * z, "row_scale_op")
    yield Work("euler_step", latent, 3 * z * e, 2.0 * z, "euler_op")
    c, side, k = s.head
    y, w, conv = c * side**2 * e, c * c * k * k, 2.0 * c * c * k * k * side**2
    head = f"[1,{c},{side},{side}]"
    yield Work("conv2d_forward", f"{head}, {k} x {k}", 2 * y + w * e, conv, "conv_mma_kernel conv_pack_kernel")
    yield Work("conv2d_backward", f"{head}, {k} x {k}", 3 * y + w * (e + 8), 2 * conv, "")
    yield Work(
        "conv2d_backward, dw",
        f"{head}, {k} x {k}",
        2 * y + w * 8,
        conv,
        "conv_weights_mma_kernel conv_weights_sum_kernel conv_weights_unfold_kernel",
    )
    yield Work("conv2d_backward, dbias", head, y, c * side**2, "conv_bias_kernel")
    yield Work("group_norm_backward", head, 3 * y, 14.0 * c * side**2, "group_backward_kernel group_parameters_kernel group_join_kernel")
    yield Work("leaky_relu_forward", head, 2 * y, 1.0 * c * side**2, "leaky_relu_op")
    yield Work("leaky_relu_backward", head, 3 * y, 1.0 * c * side**2, "leaky_relu_grad_op")
    yield Work("transpose", f"[1,{side * side},{c}]", 2 * y, 0, "transpose_kernel")
    yield Work("channel_dot_forward", head, y, 2.0 * c * side**2, "channel_dot_kernel")
    yield Work(
        "channel_dot_backward",
        head,
        2 * y,
        4.0 * c * side**2,
        "channel_dot_backward_kernel channel_dot_bias_kernel channel_dot_bias_sum_kernel",
    )
    yield Work(
        "spectral_norm_forward",
        f"[{c},{c * k * k}]",
        w * (4 + e),
        5.0 * w,
        "spectral_rows_kernel spectral_columns_kernel spectral_along_kernel spectral_scale_kernel",
    )
    yield Work("spectral_norm_backward", f"[{c},{c * k * k}]", w * (12 + e), 6.0 * w, "spectral_gradient_kernel")
    yield Work("adversarial_loss", f"{side * side} logits", 2 * side**2 * e, 6.0 * side**2, "loss_kernel loss_mean_kernel")
    c, side = s.decoder
    y, picture = c * side**2 * e, f"[1,{c},{side},{side}]"
    yield Work("conv2d_forward, decoder", f"{picture}, 3 x 3", 2 * y + 9 * c * c * e, 18.0 * c * c * side**2, "")
    yield Work(
        "group_norm_forward", picture, 2 * y, 8.0 * c * side**2, "group_forward_kernel group_apply_kernel group_sums_kernel group_means_kernel"
    )
    yield Work("upsample2x_forward", f"[1,{c},{side // 2},{side // 2}]", 1.25 * y, 0, "resample_up_kernel")
    yield Work("upsample2x_backward", picture, 1.25 * y, 0.75 * c * side**2, "resample_down_kernel")
    p = float(s.parameters)
    all_of = f"{p:.3g} parameters"
    yield Work("adamw", all_of, 28 * p, 12 * p, "adamw_kernel")
    yield Work("sum_squares", all_of, 4 * p, 2 * p, "sum_squares_kernel sum_doubles_kernel")
    yield Work("ema", all_of, 12 * p, 3 * p, "ema_op")
    yield Work("astype", f"{all_of} from float32", (4 + e) * p, 0, "ladd_convert_kernel")
    yield Work("copy", all_of, 2 * e * p, 0, "cudaMemcpyAsync")
