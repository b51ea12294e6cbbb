"""AutoencoderKL in float64: encoder to [mean, logvar], decoder to an image."""

from __future__ import annotations

from typing import Any

from . import autodiff as ad
from .autodiff import Tensor

EPS = 1e-6


class _Parts:
    def __init__(self, config: dict[str, Any], w: dict[str, Tensor]):
        self.groups, self.w = config["norm_num_groups"], w

    def conv(self, name: str, x: Tensor, stride: int = 1, pad: tuple[int, int, int, int] | None = None) -> Tensor:
        weight = self.w[name + ".weight"]
        p = weight.shape[2] // 2
        return ad.conv2d(x, weight, self.w[name + ".bias"], stride, (p, p, p, p) if pad is None else pad)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return ad.group_norm(x, self.w[name + ".weight"], self.w[name + ".bias"], self.groups, EPS)

    def resnet(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(name + ".conv1", ad.silu(self.norm(name + ".norm1", x)))
        h = self.conv(name + ".conv2", ad.silu(self.norm(name + ".norm2", h)))
        return (self.conv(name + ".conv_shortcut", x) if name + ".conv_shortcut.weight" in self.w else x) + h

    def mid(self, name: str, x: Tensor, with_attention: bool) -> Tensor:
        x = self.resnet(name + ".resnets.0", x)
        if with_attention:
            a = name + ".attentions.0."
            batch, channels, rows, columns = x.shape
            tokens = self.norm(a + "group_norm", x).reshape(batch, channels, rows * columns).transpose(0, 2, 1)
            q, k, v = (ad.linear(tokens, self.w[f"{a}{n}.weight"], self.w[f"{a}{n}.bias"]) for n in ("to_q", "to_k", "to_v"))
            out = ad.linear(ad.attention(q, k, v), self.w[a + "to_out.0.weight"], self.w[a + "to_out.0.bias"])
            x = x + out.transpose(0, 2, 1).reshape(batch, channels, rows, columns)
        return self.resnet(name + ".resnets.1", x)


def encode(config: dict[str, Any], w: dict[str, Tensor], images: Tensor) -> Tensor:
    """Moments [B, 2*latent, H/f, W/f] = [mean, logvar], logvar as it comes."""
    net, levels = _Parts(config, w), len(config["block_out_channels"])
    x = net.conv("encoder.conv_in", images)
    for i in range(levels):
        for j in range(config["layers_per_block"]):
            x = net.resnet(f"encoder.down_blocks.{i}.resnets.{j}", x)
        if i < levels - 1:  # one row and one column of zeros at the bottom and the right only
            x = net.conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", x, 2, (0, 0, 1, 1))
    x = net.mid("encoder.mid_block", x, config.get("mid_block_add_attention", True))
    x = net.conv("encoder.conv_out", ad.silu(net.norm("encoder.conv_norm_out", x)))
    return net.conv("quant_conv", x) if config.get("use_quant_conv", True) else x


def decode(config: dict[str, Any], w: dict[str, Tensor], z: Tensor) -> Tensor:
    net, levels = _Parts(config, w), len(config["block_out_channels"])
    x = net.conv("post_quant_conv", z) if config.get("use_post_quant_conv", True) else z
    x = net.mid("decoder.mid_block", net.conv("decoder.conv_in", x), config.get("mid_block_add_attention", True))
    for i in range(levels):
        for j in range(config["layers_per_block"] + 1):
            x = net.resnet(f"decoder.up_blocks.{i}.resnets.{j}", x)
        if i < levels - 1:
            x = net.conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", ad.upsample2x(x))
    return net.conv("decoder.conv_out", ad.silu(net.norm("decoder.conv_norm_out", x)))


def parameter_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    widths, latent = list(config["block_out_channels"]), config["latent_channels"]

    def conv(name: str, out: int, into: int, kernel: int = 3) -> None:
        shapes[name + ".weight"], shapes[name + ".bias"] = (out, into, kernel, kernel), (out,)

    def norm(name: str, width: int) -> None:
        shapes[name + ".weight"] = shapes[name + ".bias"] = (width,)

    def resnet(name: str, out: int, into: int) -> None:
        norm(name + ".norm1", into)
        conv(name + ".conv1", out, into)
        norm(name + ".norm2", out)
        conv(name + ".conv2", out, out)
        if out != into:
            conv(name + ".conv_shortcut", out, into, 1)

    def mid(name: str, width: int) -> None:
        resnet(name + ".resnets.0", width, width)
        resnet(name + ".resnets.1", width, width)
        if config.get("mid_block_add_attention", True):
            norm(name + ".attentions.0.group_norm", width)
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes[f"{name}.attentions.0.{part}.weight"], shapes[f"{name}.attentions.0.{part}.bias"] = (
                    (width, width),
                    (width,),
                )

    for side, order, into, out in (
        ("encoder", widths, config["in_channels"], 2 * latent),
        ("decoder", widths[::-1], latent, config["out_channels"]),
    ):
        conv(side + ".conv_in", order[0], into)
        encoding = side == "encoder"
        blocks, extra = ("down_blocks", 0) if encoding else ("up_blocks", 1)
        sampler = "downsamplers" if encoding else "upsamplers"
        before = order[0]
        for i, width in enumerate(order):
            for j in range(config["layers_per_block"] + extra):
                resnet(f"{side}.{blocks}.{i}.resnets.{j}", width, before)
                before = width
            if i < len(order) - 1:
                conv(f"{side}.{blocks}.{i}.{sampler}.0.conv", width, width)
        mid(side + ".mid_block", widths[-1])
        norm(side + ".conv_norm_out", order[-1])
        conv(side + ".conv_out", out, order[-1])
    if config.get("use_quant_conv", True):
        conv("quant_conv", 2 * latent, 2 * latent, 1)
    if config.get("use_post_quant_conv", True):
        conv("post_quant_conv", latent, latent, 1)
    return shapes
