"""CLIP with a ConvNeXt: maps at strides 4 to 32, and the joint embedding of a pixel or a mask (FC-CLIP, section 3).

Shapes are given for the published strides 4, 8, 16 and 32. An encoder with a smaller ``output_stride`` (timm's dilated
form; the scenes' has 4, 8, 8, 8) gives larger maps and nothing else changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from infoclip.clip.architecture import ConvNeXtArchitecture, build_convnext, convnext_architecture_of
from infoclip.clip.templates import TEMPLATES
from infoclip.clip.text import OPENAI_MEAN, OPENAI_STD, TextCLIP
from infoclip.errors import ConfigError
from infoclip.kernels.depthwise_conv2d import depthwise_conv2d
from infoclip.model.memory import region

if TYPE_CHECKING:
    import open_clip

__all__ = ["STRIDE", "ConvNeXtCLIP", "ConvNeXtFeatures"]

STRIDE = 32
"""Of the coarsest map as published; sides of images are multiples of it, whatever the encoder's own."""


class ConvNeXtFeatures(NamedTuple):
    """What :meth:`ConvNeXtCLIP.encode_image` gives: the outputs of the four stages, and what the visual head reads."""

    res2: Tensor  # [B, C2, H / 4, W / 4]
    res3: Tensor  # [B, C3, H / 8, W / 8]
    res4: Tensor  # [B, C4, H / 16, W / 16]
    res5: Tensor  # [B, C5, H / 32, W / 32]
    dense: Tensor  # [B, C5, H / 32, W / 32], res5 itself unless the trunk normalises before its pooling

    def detached(self) -> ConvNeXtFeatures:
        """The same maps, through which no gradient passes."""
        return ConvNeXtFeatures(*(x.detach() for x in self))


class DepthwiseConv2d(nn.Conv2d):
    """timm's depthwise convolution of a block through :func:`~infoclip.kernels.depthwise_conv2d.depthwise_conv2d`."""

    @classmethod
    def of(cls, conv: nn.Conv2d) -> nn.Conv2d:
        """The convolution with its own parameters as one of these; itself where the op does not do what it does."""
        side, dilation = conv.kernel_size[0], conv.dilation[0]
        same = cls(
            conv.in_channels, conv.out_channels, side, padding=side // 2 * dilation, dilation=dilation,
            groups=conv.in_channels, bias=conv.bias is not None, device="meta",
        )  # fmt: skip
        if type(conv) is not nn.Conv2d or side % 2 == 0 or repr(conv) != repr(same).replace(cls.__name__, "Conv2d"):
            return conv
        same.weight, same.bias = conv.weight, conv.bias
        return same

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        return depthwise_conv2d(x, self.weight, self.bias, dilation=self.dilation[0])


class ConvNeXtCLIP(TextCLIP):
    """A CLIP with a ConvNeXt of timm, such as open_clip's ``convnext_base_w_320`` and ``convnext_large_d_320``.

    The image's own embedding is ``head(norm(mean(dense)))``; the same head on a pixel of ``dense``, or on its mean
    under a mask, gives that pixel's or mask's (:meth:`embed`). Parameter names are those below ``backbone.clip_model.``
    in the checkpoints of FC-CLIP and MAFT+, but for the text tower's q, k and v, which are separate here.

    Args:
        arch: sizes and choices.
        drop_path: stochastic depth in training mode, at the rate of the architecture. Off, the image encoder stays in
            evaluation mode whatever :meth:`train` says.
        tokenizer, templates, mean, std: as :class:`~infoclip.clip.text.TextCLIP`'s.
    """

    def __init__(
        self,
        arch: ConvNeXtArchitecture,
        *,
        drop_path: bool = False,
        tokenizer: Callable[[list[str]], Tensor] | None = None,
        templates: Sequence[str] = TEMPLATES["maftplus"],
        mean: Sequence[float] = OPENAI_MEAN,
        std: Sequence[float] = OPENAI_STD,
    ) -> None:
        super().__init__(arch, tokenizer, templates, mean, std)
        self.arch: ConvNeXtArchitecture = arch
        self.drop_path = drop_path
        self.memory = "fast"  # what is kept of each block for the backward pass (infoclip.model.memory)
        self.widths = arch.widths
        self.image_size = arch.image_size
        self.visual = build_convnext(json.loads(arch.vision_cfg), arch.embed_dim)
        stages: Any = self.visual.trunk.stages  # type: ignore[union-attr]
        for stage in stages:
            for block in stage.blocks:
                block.conv_dw = DepthwiseConv2d.of(block.conv_dw)
        self.add_text_tower()
        self.train()

    @classmethod
    def from_open_clip(cls, model: open_clip.CLIP, vision_cfg: dict[str, Any], **options: Any) -> ConvNeXtCLIP:
        """A ConvNeXtCLIP with a copy of an open_clip model's weights.

        Args:
            vision_cfg: the ``vision_cfg`` that the model was built from.
            options: as the constructor's.

        Raises:
            ConfigError: an image encoder that is no ConvNeXt with a linear or MLP head.
        """
        clip = cls(convnext_architecture_of(model, vision_cfg), **options)
        clip.load_stock_state_dict(model.state_dict(), source="the open_clip model")
        return clip

    def reset_parameters(self) -> None:
        """Random weights; timm has drawn the image encoder's, this draws the text tower's."""
        self.reset_text_parameters()

    def parameter_policy(self, tune: str = "trunk", tune_positions: bool = False) -> list[str]:
        """Choose what learns, by setting ``requires_grad`` of every parameter.

        ``trunk`` (MAFT+): stem and stages of the image encoder; its head, the text tower and the logit scale stay.
        ``frozen`` (FC-CLIP): nothing.

        Returns:
            The names of the parameters that learn.

        Raises:
            ConfigError: another policy.
        """
        if tune not in ("trunk", "frozen") or tune_positions:
            raise ConfigError(
                f"clip.tune is {tune!r}{' with clip.tune_positions' * tune_positions}; "
                "expected trunk or frozen for a CLIP with a ConvNeXt."
            )
        for name, parameter in self.named_parameters():
            learns = tune == "trunk" and name.startswith(("visual.trunk.stem.", "visual.trunk.stages."))
            parameter.requires_grad_(learns)
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def train(self, mode: bool = True) -> ConvNeXtCLIP:
        """Training mode; without ``drop_path`` the image encoder computes the same in both."""
        super().train(mode)
        if not self.drop_path:
            self.visual.eval()
        return self

    def encode_image(self, image: Tensor) -> ConvNeXtFeatures:  # [B, 3, H, W]
        """The maps of normalised images.

        Raises:
            ValueError: an image that is not [B, 3, H, W] with sides that are positive multiples of 32.
        """
        sides = image.shape[2:]
        if image.ndim != 4 or image.shape[1] != 3 or 0 in sides or any(side % STRIDE for side in sides):
            raise ValueError(
                f"expected an image [B, 3, H, W] with H and W multiples of {STRIDE}, given {list(image.shape)}"
            )
        trunk: Any = self.visual.trunk
        x = trunk.stem(image)
        maps = []
        drops = self.drop_path and self.training
        mode = "reference" if drops else self.memory  # what is dropped must not be drawn again
        for stage in trunk.stages:
            x = stage.downsample(x)
            for block in stage.blocks:
                x = region(mode, block, x)
            maps.append(x)
        res2, res3, res4, res5 = maps
        return ConvNeXtFeatures(res2, res3, res4, res5, trunk.norm_pre(x))

    def embed(self, x: Tensor) -> Tensor:  # [..., C5] -> [..., d]
        """Rows of ``dense``, or means of them, in the joint space, not normalised."""
        norm: Any = getattr(self.visual.trunk.head, "norm", None)  # type: ignore[union-attr]
        if norm is not None:
            x = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return self.visual.head(x)  # type: ignore[operator]

    def embed_map(self, dense: Tensor) -> Tensor:  # [B, C5, h, w] -> [B, d, h, w]
        """Each pixel of ``dense`` in the joint space, not normalised."""
        return self.embed(dense.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def encode_global(self, image: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, d]
        """CLIP's own embedding of whole images, not normalised."""
        return self.embed(self.encode_image(image).dense.mean(dim=(2, 3)))
