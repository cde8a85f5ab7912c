"""Fused operators of Ascend NPUs in the place of a model's own: ``enable_npu_patch``.

RMSNorm of diffusers calls ``torch_npu.npu_rms_norm`` by itself wherever torch_npu is installed.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


def fuse_rotary(model: Module) -> None:
    """Let the attention of Z-Image's denoiser rotate queries and keys by ``torch_npu.npu_rotary_mul``, in fp32."""
    from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor

    for module in model.modules():
        processor = getattr(module, "processor", None)
        if isinstance(processor, ZSingleStreamAttnProcessor):
            module.set_processor(_FusedRotary(processor))  # type: ignore[operator]


def fuse_norms(model: Module) -> None:
    """Let the norms of Qwen3 call ``torch_npu.npu_rms_norm``."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    for module in model.modules():
        if isinstance(module, Qwen3RMSNorm):
            module.forward = partial(_rms_norm, module)


def _rms_norm(norm: Any, hidden_states: Tensor) -> Tensor:
    import torch_npu

    normed: Tensor = torch_npu.npu_rms_norm(
        hidden_states.to(norm.weight.dtype), norm.weight, epsilon=norm.variance_epsilon
    )[0]
    return normed


class _FusedRotary:
    """Z-Image's attention processor, but for the rotation.

    Args:
        processor: Does the rest.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        rotated = attn if freqs_cis is None else _Rotated(attn, freqs_cis)
        output: Tensor = self._processor(rotated, hidden_states, encoder_hidden_states, attention_mask)
        return output


class _Rotated:
    """An attention whose norms also rotate, as the processor would after them.

    Args:
        attn: The attention.
        freqs_cis: The rotations as complex numbers [batch, token, channel / 2], one for two neighbouring channels.
    """

    def __init__(self, attn: Any, freqs_cis: Tensor) -> None:
        import torch

        self._attn = attn
        cos_sin = torch.view_as_real(freqs_cis).repeat_interleave(2, dim=-2)[:, :, None]
        self._cos, self._sin = (part.contiguous() for part in cos_sin.unbind(-1))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    def norm_q(self, query: Tensor) -> Tensor:
        """Normalise and rotate queries [batch, token, head, channel]."""
        return self._rotate(query if self._attn.norm_q is None else self._attn.norm_q(query))

    def norm_k(self, key: Tensor) -> Tensor:
        """Normalise and rotate keys."""
        return self._rotate(key if self._attn.norm_k is None else self._attn.norm_k(key))

    def _rotate(self, states: Tensor) -> Tensor:
        import torch_npu

        rotated: Tensor = torch_npu.npu_rotary_mul(states.float(), self._cos, self._sin, rotary_mode="interleave")
        return rotated.type_as(states)
