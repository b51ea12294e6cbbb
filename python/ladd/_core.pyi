"""The C core as Python sees it. Strict on purpose: arrays are float32, C-contiguous and of exactly the shape that is written here, or the call
raises TypeError (wrong kind or dtype) or ValueError (wrong shape, layout or number) and has changed nothing. `ladd.kernels` and `ladd.models` are the
friendly layers above it: they convert, check meanings and document.

Letters: B batch, C channels, H W size, N image tokens, T text tokens, S tokens, D width, J context width, P pooled width, G groups. Sizes must be at
least 1. `out=None` allocates the result; a given `out` is written and returned. It may be the very memory of an input of the same shape where
"in place" is said; any other overlap is an error. Names of gradients start with d. Gradients are returned in fresh arrays unless said otherwise.

On a device the same functions take and return DeviceArray in place of ndarray: all arrays of a call on one device, of one compute type, but for
statistics (mean, rstd, lse), gradients of parameters, masters and moments, which are float32, and numbers a sample that the host reads (sigma, t, factor,
samples), which stay ndarray. They return before the work is done, unless they return a number.

Every function and method releases the GIL while it computes. Methods of one model (and of what its forwards saved) exclude each other, so one model
may be used from several threads; arrays that a caller shares between threads, tensors() views among them, are the caller's to guard. Ctrl-C is
noticed between the layers of a model: the objects stay usable, but an interrupted backward has added a part of the parameter gradients.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, Self, TypeAlias, final, overload

import numpy as np
from numpy.typing import NDArray

_Array: TypeAlias = NDArray[np.float32]
_Samples: TypeAlias = NDArray[np.int64]
_Stream: TypeAlias = tuple[_Array, _Array, _Array]

# ---- settings --------------------------------------------------------------------------------------------------------------------------------

def set_num_threads(n: int, /) -> None: ...
def get_num_threads() -> int: ...
def backend_name() -> str:
    """The instruction set that serves this process: "avx512", "avx2" or "plain" (the environment variable LADD_CPU chooses)."""

def empty_cache() -> None:
    """Gives memory that is kept for the next forward back to the system."""

def memory_in_use() -> int:
    """Bytes of activations that are alive now: running forwards and what was saved for a backward."""

def openblas_config() -> str: ...

# ---- devices ---------------------------------------------------------------------------------------------------------------------------------

@final
class Device:
    """One device of the extension whose capsule is given. `str(device)` is "cuda:0". ladd.device.get() keeps one object a device."""
    def __new__(cls, provider: Any, index: int) -> Self: ...
    def info(self) -> dict[str, Any]:
        """name, architectures (what the kernels were compiled for), capability (90 is 9.0), driver, runtime, memory_free, memory_total (bytes)."""
    def wait(self) -> None:
        """Until all that was queued is done."""
    def use_stream(self, handle: int | None, /) -> None:
        """Work goes to this CUDA stream from now on, behind what was queued before; None: back to the device's own."""
    def empty(self, shape: Sequence[int], dtype: str = "float32", zeroed: bool = False) -> DeviceArray: ...
    def from_dlpack(self, value: Any, name: str, /) -> DeviceArray:
        """On the memory of anything with __dlpack__ on this device; the producer's work is waited for by the stream, not by the host."""
    def from_pointer(self, owner: Any, name: str, pointer: int, shape: Sequence[int], typestr: str, stream: int | None, /) -> DeviceArray:
        """The same from the parts of __cuda_array_interface__."""
    def set_attention(self, rules: Sequence[tuple[str, int, bool, int, int, bool]], /) -> None:
        """(dtype, head_dim, backward, least tokens, most tokens, cudnn): the first that fits a call decides; none: ladd's kernels."""
    def capture_begin(self) -> None: ...
    def capture_end(self) -> Any: ...
    def replay(self, graph: Any, /) -> None: ...
    @property
    def index(self) -> int: ...
    @property
    def stream(self) -> int:
        """The handle of the CUDA stream in use."""

@final
class DeviceArray:
    """A dense array on a device. It computes nothing: torch, cupy and jax take it by DLPack without a copy."""
    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: .numpy() says that it copies and waits."""
    def numpy(self) -> _Array:
        """A float32 copy on the host; waits for the work that makes it."""
    def copy(self) -> DeviceArray: ...
    def astype(self, dtype: str, /) -> DeviceArray:
        """A copy as "float32", "bfloat16" or "float16"."""
    def reshape(self, *shape: Any) -> DeviceArray:
        """A view."""
    def __getitem__(self, key: Any, /) -> DeviceArray:
        """[a:b] and [i] along the first axis, [...]: views."""
    def __setitem__(self, key: Any, value: Any, /) -> None:
        """Copies a host array or one of this device, of the same shape, or 0."""
    def __len__(self) -> int: ...
    def __dlpack__(self, *, stream: int | None = None, max_version: Any = None, dl_device: Any = None, copy: bool | None = None) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> Device: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

# ---- models ----------------------------------------------------------------------------------------------------------------------------------

class Model:
    """What all models share. Not to be made directly."""
    def ready(self) -> None: ...
    def init(self, seed: int) -> None:
        """The standard initialisation; the same seed gives the same weights everywhere."""
    def tensors(self) -> dict[str, _Array]:
        """Every parameter and buffer by its diffusers name: writable views, which keep the model alive."""
    def gradients(self) -> dict[str, _Array]:
        """The gradient of every trainable parameter: writable views. Zero on first use; backward adds to them."""
    def trainable_names(self) -> list[str]: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def flat(self) -> _Array:
        """All elements of all tensors, 1-D, trainable ones first: a view."""
    @property
    def flat_trainable(self) -> _Array:
        """The trainable elements, 1-D: a view."""
    @property
    def flat_grad(self) -> _Array:
        """Their gradients in the same order, 1-D: a view."""

@final
class MMDiT(Model):
    """config: sample_size, patch_size, in_channels, out_channels, num_layers, num_attention_heads, attention_head_dim, joint_attention_dim,
    caption_projection_dim, pooled_projection_dim, pos_embed_max_size (int), qk_norm (None | "rms_norm"), dual_attention_layers (sequence of int).
    Keys may be missing (diffusers' defaults; out_channels None = in_channels); unknown keys are a ValueError. Weights are zero until init() or until
    they are written; the position table is computed."""
    def __new__(cls, config: Mapping[str, Any], device: Device | None = None, dtype: str = "float32") -> Self: ...
    def plan(
        self,
        batch: int,
        height: int,
        width: int,
        text_tokens: int,
        skip_layers: Sequence[int] = (),
        taps: Sequence[int] | None = None,
        keep: bool = False,
        params: bool = True,
    ) -> int:
        """Bytes of activations that forward with these arguments takes."""
    @overload
    def forward(
        self,
        latents: _Array,
        sigma: _Array,
        context: _Array,
        pooled: _Array,
        skip_layers: Sequence[int] = (),
        taps: None = None,
        keep: bool = False,
        params: bool = True,
    ) -> tuple[_Array, MMDiTSaved | None]:
        """latents[B,C,H,W], sigma[B], context[B,T,J], pooled[B,P] -> velocity[B,C_out,h*p,w*p]; with taps a list of features[B,N,D], one a tap,
        ascending, and nothing deeper than the last tap is computed. keep: also return what backward needs; with
        params False of a backward that asks for neither parameters nor pooled, which is less."""
    @overload
    def forward(
        self,
        latents: _Array,
        sigma: _Array,
        context: _Array,
        pooled: _Array,
        skip_layers: Sequence[int] = (),
        *,
        taps: Sequence[int],
        keep: bool = False,
        params: bool = True,
    ) -> tuple[list[_Array], MMDiTSaved | None]: ...

@final
class MMDiTSaved:
    def backward(
        self, cotangent: _Array | Sequence[_Array], params: bool = True, latents: bool = True, context: bool = True, pooled: bool = True
    ) -> tuple[_Array | None, _Array | None, _Array | None]:
        """cotangent: shaped as forward's result. -> dlatents, dcontext, dpooled (None where not asked for); with params the parameter gradients are
        added to model.gradients(). Once: it reuses the saved memory, and a second call is a RuntimeError."""

@final
class AutoencoderKL(Model):
    """config: in_channels, out_channels, latent_channels, block_out_channels (sequence of int), layers_per_block, norm_num_groups, use_quant_conv,
    use_post_quant_conv, mid_block_add_attention. Also accepted and checked, as only one value is built: act_fn ("silu"), down_block_types (all
    "DownEncoderBlock2D"), up_block_types (all "UpDecoderBlock2D"). Keys may be missing (diffusers' defaults); unknown keys are a ValueError."""
    def __new__(cls, config: Mapping[str, Any], device: Device | None = None, dtype: str = "float32") -> Self: ...
    def encode(self, images: _Array, keep: bool = False) -> tuple[_Array, AutoencoderKLSaved | None]:
        """images[B,Cin,H,W] -> moments[B,2C,H/f,W/f] = mean and log variance (not clamped)."""
    def decode(self, z: _Array, keep: bool = False) -> tuple[_Array, AutoencoderKLSaved | None]:
        """z[B,C,H,W] (unscaled) -> images[B,Cout,H*f,W*f]."""
    def plan(self, batch: int, height: int, width: int, decode: bool = False, keep: bool = False) -> int:
        """Bytes of activations of one encode of images of that size, or of a decode to them; keep: that a backward follows."""

@final
class AutoencoderKLSaved:
    def backward(self, dout: _Array, params: bool = True, input: bool = True) -> _Array | None:
        """-> dinput. Once, as for MMDiTSaved."""

@final
class Discriminator(Model):
    """config: feature_dim, taps (sequence of int), pooled_dim, width, kernel_size, norm ("group" | "none"), num_groups, spectral_norm (bool),
    condition_sigma (bool), condition_pooled (bool), condition_dim. All are required."""
    def __new__(cls, config: Mapping[str, Any], device: Device | None = None, dtype: str = "float32") -> Self: ...
    def forward(
        self,
        features: Sequence[_Array],
        sigma: _Array,
        pooled: _Array | None,
        grid: tuple[int, int],
        update_u: bool = False,
        keep: bool = False,
    ) -> tuple[list[_Array], DiscriminatorSaved | None]:
        """features: one [B,h*w,D] a tap; sigma[B]; pooled[B,P], None only if the heads do not use it -> logits, one [B,h,w] a tap.
        update_u: one power iteration on each spectral norm first."""

@final
class DiscriminatorSaved:
    def backward(self, dlogits: Sequence[_Array], params: bool = True, features: bool = True) -> list[_Array] | None:
        """-> dfeatures. May be called more than once."""

    def r1(self, weight: float, epsilon: float, *, out: _Array | None = None) -> float:
        """-> mean over the batch of |d(sum of logits)/d(features)|^2; weight times its derivative is added to the parameters' gradients."""

# ---- kernels: random numbers and diffusion -------------------------------------------------------------------------------------------------------

def normal(
    shape: Sequence[int], seed: int, purpose: int, step: int | _Array = 0, samples: _Samples | None = None, *, out: _Array | None = None
) -> _Array:
    """Standard normal numbers of Philox keyed by (seed, purpose, step); row b is drawn for sample samples[b] (default 0, 1, ...)."""

@overload
def renoise(
    x0: _Array,
    t: _Array,
    seed: int,
    purpose: int,
    step: int | _Array = 0,
    samples: _Samples | None = None,
    return_noise: Literal[False] = False,
    *,
    out: _Array | None = None,
) -> _Array:
    """x0[B,...], t[B] -> (1 - t) x0 + t e, e as normal() draws it. In place allowed."""

@overload
def renoise(
    x0: _Array,
    t: _Array,
    seed: int,
    purpose: int,
    step: int | _Array = 0,
    samples: _Samples | None = None,
    *,
    return_noise: Literal[True],
    out: _Array | None = None,
) -> tuple[_Array, _Array]: ...
def interpolate(x0: _Array, noise: _Array, t: _Array, *, out: _Array | None = None) -> _Array:
    """(1 - t) x0 + t noise for t[B]. In place allowed."""

def predict_x0(x: _Array, v: _Array, t: _Array, *, out: _Array | None = None) -> _Array:
    """x - t v for t[B]. In place allowed."""

def row_scale(x: _Array, factor: _Array, *, out: _Array | None = None) -> _Array:
    """factor x for factor[B]. In place allowed."""

def euler_step(x: _Array, v: _Array, sigma: float, sigma_next: float, *, out: _Array | None = None) -> _Array:
    """x + (sigma_next - sigma) v. In place allowed."""

def adversarial_loss(
    logits: _Array,
    loss: Literal["hinge", "logistic", "lsgan", "bce"],
    role: Literal["real", "fake", "generator"],
    weight: float = 1.0,
    *,
    values: _Array | None = None,
) -> tuple[float, _Array]:
    """-> mean loss over all logits, dlogits = the gradient of that mean times weight.

    values: three float64 in pairs of float32 where the logits are. Mean loss, mean logit and the share of logits beyond 1 (fake: -1) go
    there, nobody waits for them, and None comes in the place of the loss."""

# ---- kernels: flat buffers -----------------------------------------------------------------------------------------------------------------------

def adamw(
    p: _Array,
    m: _Array | None,
    v: _Array,
    g: _Array,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
    *,
    control: _Array | None = None,
    rounding: tuple[int, int, int | _Array] | None = None,
) -> None:
    """One step on p, m, v in place, 1-D; m may be None where beta1 is 0. g is multiplied by grad_scale first; step counts from 1.

    control [4], where p is: adamw_control's numbers and g's factor, in the place of lr, weight_decay, step and grad_scale; a factor that
    is not finite: nothing changes. rounding (seed, purpose, step): p is rounded to bfloat16 at random."""

def adamw_control(lr: float, weight_decay: float, beta1: float, beta2: float, step: float) -> tuple[float, float, float]: ...
def clip_factor(
    factor: _Array, norm: _Array, failed: _Array, done: _Array, squares: _Array, checked: _Array | None, max_norm: float, who: int
) -> None:
    """factor [1] = min(1, max_norm / norm), norm = sqrt(sum of squares), without a look at them: NaN where norm or one of `checked` is not
    finite or failed[0] is set. The first such call sets failed = (who, norm); done counts the others. All but factor are float64 in pairs
    of float32."""

def r1_factors(factors: _Array, penalty: _Array, sums: _Array, weight: float, epsilon: float, scale: float) -> None:
    """factors [4] = h, -h, weight / h, -weight / h with h = epsilon sqrt(sums[1] / sums[0]), zeros where one of the sums is 0; penalty +=
    scale sums[0]. penalty and sums are float64 in pairs of float32."""

def sum_squares(x: _Array, *, out: _Array | None = None) -> float:
    """out: a float64 in a pair of float32 where x is; then nobody waits, and None comes back."""

def ema(e: _Array, p: _Array, decay: float, *, control: _Array | None = None) -> None:
    """e = decay e + (1 - decay) p, in place. control [2], where e is: the decay, and a number that is not finite where nothing shall change."""

def zero(y: _Array) -> None: ...
def copy(x: _Array, *, out: _Array | None = None) -> _Array: ...
def add(a: _Array, b: _Array, *, out: _Array | None = None) -> _Array:
    """In place allowed."""

def axpy(y: _Array, x: _Array, alpha: float) -> None:
    """y += alpha x, in place."""

def scale(x: _Array, alpha: float, *, out: _Array | None = None) -> _Array:
    """In place allowed."""

# ---- kernels: layers -----------------------------------------------------------------------------------------------------------------------------

def attention_forward(streams: Sequence[_Stream], scale: float | None = None, dtype: str | None = None) -> tuple[list[_Array], _Array]:
    """Joint attention over one or two streams of (q, k, v), each [B,n,heads,dh]; tokens attend over all streams. scale: default 1/sqrt(dh).
    -> one o[B,n,heads,dh] a stream, lse[B,heads,S]. q, k, v may be slices of one packed array: of a stream they share strides, and the last two axes
    are contiguous. dtype "bfloat16": products in it, on the CPU."""

def attention_backward(
    douts: Sequence[_Array],
    streams: Sequence[_Stream],
    outs: Sequence[_Array],
    lse: _Array,
    scale: float | None = None,
    dtype: str | None = None,
) -> list[_Stream]:
    """-> (dq, dk, dv), each [B,n,heads,dh], one triple a stream."""

def layer_norm_modulate_forward(
    x: _Array, shift: _Array | None, scale: _Array | None, eps: float = 1e-6, *, out: _Array | None = None
) -> tuple[_Array, _Array, _Array]:
    """x[B,N,D], shift[B,D], scale[B,D] (both or neither) -> y = norm(x) (1 + scale) + shift, mean[B,N], rstd[B,N]."""

def layer_norm_modulate_backward(
    dy: _Array, x: _Array, mean: _Array, rstd: _Array, scale: _Array | None
) -> tuple[_Array, _Array | None, _Array | None]:
    """-> dx, dshift, dscale."""

def gate_residual_forward(x: _Array, y: _Array, gate: _Array, *, out: _Array | None = None) -> _Array:
    """x[B,N,D] + gate[B,D] y[B,N,D]. In place on x allowed."""

def gate_residual_backward(dout: _Array, y: _Array, gate: _Array) -> tuple[_Array, _Array]:
    """-> dy, dgate (dx is dout)."""

def rms_norm_heads_forward(x: _Array, w: _Array, eps: float = 1e-6, *, out: _Array | None = None) -> tuple[_Array, _Array]:
    """x[R,heads,dh], w[dh] -> y, rstd[R,heads]."""

def rms_norm_heads_backward(dy: _Array, x: _Array, rstd: _Array, w: _Array) -> tuple[_Array, _Array]:
    """-> dx, dw."""

def linear_forward(x: _Array, w: _Array, bias: _Array | None = None, *, out: _Array | None = None) -> _Array:
    """x[M,K] w[N,K]^T + bias[N]."""

def linear_backward(
    dy: _Array, x: _Array, w: _Array, *, input: bool = True, weight: bool = True, bias: bool = True
) -> tuple[_Array | None, _Array | None, _Array | None]:
    """-> dx, dw, dbias (None where not asked for)."""

def linear_gelu_forward(x: _Array, w: _Array, bias: _Array | None = None, *, out: _Array | None = None) -> tuple[_Array, _Array]:
    """-> y = gelu(h), h = x w^T + bias. Backward: gelu_backward(dy, h), then linear_backward."""

def gelu_forward(x: _Array, *, out: _Array | None = None) -> _Array: ...
def gelu_backward(dy: _Array, x: _Array, *, out: _Array | None = None) -> _Array:
    """In place on dy allowed; so in the other activations."""

def silu_forward(x: _Array, *, out: _Array | None = None) -> _Array: ...
def silu_backward(dy: _Array, x: _Array, *, out: _Array | None = None) -> _Array: ...
def leaky_relu_forward(x: _Array, slope: float = 0.2, *, out: _Array | None = None) -> _Array: ...
def leaky_relu_backward(dy: _Array, x: _Array, slope: float = 0.2, *, out: _Array | None = None) -> _Array: ...
def conv2d_forward(
    x: _Array,
    w: _Array,
    bias: _Array | None = None,
    stride: int = 1,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    *,
    out: _Array | None = None,
) -> _Array:
    """x[B,Cin,H,W], w[Cout,Cin,kh,kw], bias[Cout], padding (top, left, bottom, right) -> y[B,Cout,Ho,Wo]."""

def conv2d_backward(
    dy: _Array,
    x: _Array,
    w: _Array,
    stride: int = 1,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    *,
    input: bool = True,
    weight: bool = True,
    bias: bool = True,
) -> tuple[_Array | None, _Array | None, _Array | None]:
    """-> dx, dw, dbias (None where not asked for)."""

def group_norm_forward(
    x: _Array, gamma: _Array, beta: _Array, groups: int, eps: float = 1e-6, silu: bool = False, *, out: _Array | None = None
) -> tuple[_Array, _Array, _Array]:
    """x[B,C,L], gamma[C], beta[C] -> y, mean[B,G], rstd[B,G]; silu: followed by SiLU."""

def group_norm_backward(
    dy: _Array, x: _Array, mean: _Array, rstd: _Array, gamma: _Array, beta: _Array, silu: bool = False
) -> tuple[_Array, _Array, _Array]:
    """-> dx, dgamma, dbeta."""

def upsample2x_forward(x: _Array, *, out: _Array | None = None) -> _Array:
    """x[B,C,H,W] -> y[B,C,2H,2W], nearest."""

def upsample2x_backward(dy: _Array, *, out: _Array | None = None) -> _Array: ...
def spectral_norm_forward(w: _Array, u: _Array, iterations: int = 1) -> tuple[_Array, _Array, float]:
    """w[R,K], u[R] (updated in place by the power iterations) -> w / sigma, v[K], sigma."""

def spectral_norm_backward(dw_hat: _Array, w_hat: _Array, u: _Array, v: _Array, sigma: float) -> _Array: ...
def channel_dot_forward(x: _Array, e: _Array, bias: _Array, *, out: _Array | None = None) -> _Array:
    """x[B,C,L], e[B,C], bias[1] -> y[B,L] = sum of e x over the channels, plus bias."""

def channel_dot_backward(dy: _Array, x: _Array, e: _Array) -> tuple[_Array, _Array, _Array]:
    """-> dx, de, dbias."""

def transpose(x: _Array, *, out: _Array | None = None) -> _Array:
    """x[B,R,Q] -> [B,Q,R]."""

def patch_gather(image: _Array, patch_size: int, channel_last: bool = False) -> _Array:
    """image[B,C,H,W] -> tokens[B,h*w,C*p*p]; a token's numbers are in the order (channel, dy, dx), or (dy, dx, channel) with channel_last."""

def patch_scatter(tokens: _Array, channels: int, height: int, width: int, patch_size: int, channel_last: bool = False) -> _Array:
    """tokens[B,h*w,C*p*p] -> image[B,C,H,W]; zeros where no patch covers it."""

def add_position(x: _Array, table: _Array, grid: tuple[int, int]) -> None:
    """x[B,h*w,D] += the centre h by w of table[max,max,D], in place."""

def timestep_features(sigma: _Array, dim: int, *, out: _Array | None = None) -> _Array:
    """sigma[B] -> [B,dim], the sinusoidal features of 1000 sigma."""
