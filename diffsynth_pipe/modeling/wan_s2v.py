"""The denoiser of Wan2.2-S2V, which diffusers lacks: Wan's blocks, between which each frame hears its audio.

The names of layers are those of diffusers' open pull request 12258. The motion frames of earlier clips, which a long
video goes on from, are not implemented: training never has them. Their layers are there, so that weights load whole.
"""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNorm, FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanRotaryPosEmbed,
    WanTimeTextImageEmbedding,
    WanTransformerBlock,
)
from torch import Tensor, nn
from torch.nn import functional

NUM_PAST_FRAMES = (73, 19)
"""Frames before the clip that the audio encoder sees, and the latent frames that they make; in training, the clip's
first audio stands in all of them."""
REFERENCE_PLACE = 30
"""The frame at which the reference picture stands for the rotary embedding."""


class CausalConv1d(nn.Module):
    """A convolution over time that sees no later steps; ``[batch, channel, time]``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size=3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution; the first step stands before it as often as needed."""
        out: Tensor = self.conv(functional.pad(x, (2, 0), mode="replicate"))
        return out


class CausalConvLayer(nn.Module):
    """A convolution that halves time, LayerNorm and SiLU; ``[batch, time, channel]``."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = CausalConv1d(in_channels, out_channels, stride=2)
        self.norm = nn.LayerNorm(out_channels, elementwise_affine=False, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[batch, time / 2, channel]``, rounded up."""
        return functional.silu(self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2)))


class WeightedAverageLayer(nn.Module):
    """The weighted mean of the hidden states of wav2vec 2.0."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((1, num_layers, 1, 1), 0.01))

    def forward(self, features: Tensor) -> Tensor:
        """Return ``[batch, channel, frame]`` of ``[batch, layer, channel, frame]``."""
        weights = functional.silu(self.weights)
        return (features * weights / weights.sum(dim=1, keepdim=True)).sum(dim=1)


class AudioTokens(nn.Module):
    """Makes tokens of audio features: some for each latent frame, and one more for the frame as a whole."""

    def __init__(self, in_channels: int, width: int, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.conv1_local = CausalConv1d(in_channels, width // 4 * num_tokens)
        self.conv1_global = CausalConv1d(in_channels, width // 4)
        self.norm1 = nn.LayerNorm(width // 4, elementwise_affine=False, eps=1e-6)
        self.conv2 = CausalConvLayer(width // 4, width // 2)
        self.conv3 = CausalConvLayer(width // 2, width)
        self.final_linear = nn.Linear(width, width)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the frames' own tokens ``[batch, frame / 4, channel]`` and the others, with one that is learned.

        Args:
            features: ``[batch, channel, frame]``.
        """
        each = self.conv1_local(features).unflatten(1, (self.num_tokens, -1)).flatten(0, 1)
        each = torch.unflatten(self._shorten(each), 0, (len(features), -1)).transpose(1, 2)
        padding = self.padding_tokens.expand(*each.shape[:2], -1, -1).to(each.dtype)
        return self.final_linear(self._shorten(self.conv1_global(features))), torch.cat([each, padding], dim=2)

    def _shorten(self, x: Tensor) -> Tensor:
        shortened: Tensor = self.conv3(self.conv2(functional.silu(self.norm1(x.transpose(1, 2)))))
        return shortened


class CausalAudioEncoder(nn.Module):
    """What the denoiser makes of the hidden states of wav2vec 2.0."""

    def __init__(self, num_layers: int, in_channels: int, width: int, num_tokens: int) -> None:
        super().__init__()
        self.weighted_avg = WeightedAverageLayer(num_layers)
        self.encoder = AudioTokens(in_channels, width, num_tokens)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return as ``AudioTokens``, for the latent frames of the clip alone.

        Args:
            features: ``[batch, layer, channel, frame]``.
        """
        num_frames, num_latent_frames = NUM_PAST_FRAMES
        features = torch.cat([features[..., :1].expand(-1, -1, -1, num_frames), features], dim=-1)
        of_frames, tokens = self.encoder(self.weighted_avg(features))
        return of_frames[:, num_latent_frames:], tokens[:, num_latent_frames:]


class TimeTextAudioPoseEmbedding(WanTimeTextImageEmbedding):  # type: ignore[misc]
    """Wan's embedding of time and text, beside those of audio and pose, which are called by their names."""

    def __init__(
        self, width: int, freq_dim: int, text_dim: int, audio: CausalAudioEncoder, pose_embedder: nn.Module
    ) -> None:
        super().__init__(width, time_freq_dim=freq_dim, time_proj_dim=6 * width, text_embed_dim=text_dim)
        self.causal_audio_encoder = audio
        self.pose_embedder = pose_embedder


class RotaryPosEmbed(WanRotaryPosEmbed):  # type: ignore[misc]
    """Wan's rotary embedding, with the reference picture behind the clip."""

    def forward(self, latents: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines ``[1, token, 1, channel]`` of the tokens of the clip, then of the picture."""
        picture = reference.expand(-1, -1, REFERENCE_PLACE + 1, -1, -1)
        num_tokens = reference[0, 0].numel() // math.prod(self.patch_size)
        cos, sin = (
            torch.cat([clip, places[:, -num_tokens:]], dim=1)
            for clip, places in zip(super().forward(latents), super().forward(picture), strict=True)
        )
        return cos, sin


class SpeechTransformerBlock(WanTransformerBlock):  # type: ignore[misc]
    """Wan's block, with a modulation of its own for the tokens that are not noised."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: tuple[Tensor, Tensor],
        num_noised: int,
    ) -> Tensor:
        """Return the tokens ``[batch, token, channel]``.

        Args:
            hidden_states: Tokens, the first ``num_noised`` of which are noised.
            encoder_hidden_states: Text.
            temb: Modulation ``[batch, 2, 6, channel]``, of the noised tokens and of the others.
            rotary_emb: Cosines and sines.
            num_noised: See above.
        """
        dtype = hidden_states.dtype
        sizes = [num_noised, hidden_states.shape[1] - num_noised]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
            part.split_with_sizes([1, 1], dim=1) for part in (self.scale_shift_table + temb.float()).unbind(2)
        )

        def modulated(tokens: Tensor, scales: tuple[Tensor, ...], shifts: tuple[Tensor, ...]) -> Tensor:
            parts = zip(tokens.split_with_sizes(sizes, dim=1), scales, shifts, strict=True)
            return torch.cat([part * (1 + by) + plus for part, by, plus in parts], dim=1).to(dtype)

        def gated(tokens: Tensor, update: Tensor, gates: tuple[Tensor, ...]) -> Tensor:
            parts = zip(update.float().split_with_sizes(sizes, dim=1), gates, strict=True)
            return (tokens.float() + torch.cat([part * by for part, by in parts], dim=1)).to(dtype)

        attended = self.attn1(modulated(self.norm1(hidden_states.float()), scale, shift), None, None, rotary_emb)
        hidden_states = gated(hidden_states, attended, gate)
        normed = self.norm2(hidden_states.float()).to(dtype)
        hidden_states = hidden_states + self.attn2(normed, encoder_hidden_states, None, None)
        update = self.ffn(modulated(self.norm3(hidden_states.float()), ffn_scale, ffn_shift))
        return gated(hidden_states, update, ffn_gate)


class AudioInjector(nn.Module):
    """Lets the tokens of each latent frame attend to those of its audio, after some of the blocks."""

    def __init__(self, num_places: int, width: int, num_heads: int, eps: float) -> None:
        super().__init__()
        head_dim = width // num_heads
        self.injector = nn.ModuleList(
            WanAttention(
                width, num_heads, head_dim, eps, cross_attention_dim_head=head_dim, processor=WanAttnProcessor()
            )
            for _ in range(num_places)
        )
        self.injector_adain_layers = nn.ModuleList(
            AdaLayerNorm(width, output_dim=2 * width, chunk_dim=1) for _ in range(num_places)
        )

    def forward(self, hidden_states: Tensor, of_frames: Tensor, audio: Tensor, place: int, num_noised: int) -> Tensor:
        """Return the tokens ``[batch, token, channel]``.

        Args:
            hidden_states: Tokens, the first ``num_noised`` of which are of the clip.
            of_frames: One audio token per latent frame, ``[batch, frame, channel]``.
            audio: More of them, ``[batch, frame, token, channel]``.
            place: Which of the injectors it is.
            num_noised: See above.
        """
        clip = torch.unflatten(hidden_states[:, :num_noised], 1, (audio.shape[1], -1)).flatten(0, 1)
        normed = self.injector_adain_layers[place](clip, temb=of_frames.flatten(0, 1))
        heard = self.injector[place](normed, audio.flatten(0, 1)).unflatten(0, audio.shape[:2]).flatten(1, 2)
        return torch.cat([hidden_states[:, :num_noised] + heard, hidden_states[:, num_noised:]], dim=1)


class FramePackMotioner(nn.Module):
    """The layers that embed the motion frames of an earlier clip; not called."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj, self.proj_2x, self.proj_4x = (
            nn.Conv3d(in_channels, width, size, stride=size) for size in ((1, 2, 2), (2, 4, 4), (4, 8, 8))
        )


class WanS2VTransformer3DModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):  # type: ignore[misc]
    """The denoiser; the defaults are those of Wan2.2-S2V-14B.

    Args:
        patch_size: Of a token, in latent frames and pixels.
        num_attention_heads: Of all attentions.
        attention_head_dim: Channels of each.
        in_channels: Of the latents.
        out_channels: Of the velocity.
        text_dim: Channels of the text.
        freq_dim: Frequencies of a timestep.
        audio_dim: Channels of wav2vec 2.0.
        audio_inject_layers: The blocks after which the audio is heard.
        num_audio_tokens: Of each latent frame, beside the learned one.
        num_weighted_avg_layers: Hidden states of wav2vec 2.0.
        pose_dim: Channels of the pose's latents.
        ffn_dim: Channels within the feed-forward layers.
        num_layers: Blocks.
        eps: Of the norms.
        rope_max_seq_len: Places along each axis.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ("patch_embedding", "condition_embedder", "norm")
    _no_split_modules = ("SpeechTransformerBlock",)
    _keep_in_fp32_modules = ("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        audio_dim: int = 1024,
        audio_inject_layers: tuple[int, ...] = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39),
        num_audio_tokens: int = 4,
        num_weighted_avg_layers: int = 25,
        pose_dim: int = 16,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        eps: float = 1e-6,
        rope_max_seq_len: int = 1024,
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.rope = RotaryPosEmbed(attention_head_dim, patch_size, rope_max_seq_len)
        self.patch_embedding = nn.Conv3d(in_channels, width, kernel_size=patch_size, stride=patch_size)
        self.frame_packer = FramePackMotioner(in_channels, width)
        self.trainable_condition_mask = nn.Embedding(3, width)
        self.condition_embedder = TimeTextAudioPoseEmbedding(
            width,
            freq_dim,
            text_dim,
            CausalAudioEncoder(num_weighted_avg_layers, audio_dim, width, num_audio_tokens),
            nn.Conv3d(pose_dim, width, kernel_size=patch_size, stride=patch_size),
        )
        self.blocks = nn.ModuleList(
            SpeechTransformerBlock(width, ffn_dim, num_attention_heads, cross_attn_norm=True, eps=eps)
            for _ in range(num_layers)
        )
        self.audio_injector = AudioInjector(len(audio_inject_layers), width, num_attention_heads, eps)
        self.norm_out = FP32LayerNorm(width, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(width, out_channels * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        audio_embeds: Tensor,
        image_latents: Tensor,
        pose_latents: Tensor,
    ) -> Tensor:
        """Return the velocity, shaped as ``hidden_states``.

        Args:
            hidden_states: Noised latents behind the first frame's, ``[batch, channel, frame, height, width]``.
            timestep: In [0, 1000], ``[batch]``.
            encoder_hidden_states: Text, ``[batch, token, channel]``.
            audio_embeds: Hidden states of wav2vec 2.0, ``[batch, layer, channel, 4 * frame]``.
            image_latents: The reference picture, ``[batch, channel, 1, height, width]``.
            pose_latents: As ``hidden_states``; zeros where there is no pose.
        """
        size = [length // patch for length, patch in zip(hidden_states.shape[2:], self.config.patch_size, strict=True)]
        rotary_emb = self.rope(hidden_states, image_latents)
        embedder = self.condition_embedder
        clip = self.patch_embedding(hidden_states) + embedder.pose_embedder(pose_latents)
        tokens, picture = (part.flatten(2).transpose(1, 2) for part in (clip, self.patch_embedding(image_latents)))
        num_noised = tokens.shape[1]
        kinds = torch.zeros(num_noised + picture.shape[1], dtype=torch.long, device=tokens.device)
        kinds[num_noised:] = 1
        tokens = torch.cat([tokens, picture], dim=1)
        tokens = tokens + self.trainable_condition_mask(kinds).to(tokens.dtype)

        timesteps = torch.cat([timestep, torch.zeros_like(timestep)])  # the picture is clean
        temb, modulation, text, _ = embedder(timesteps, encoder_hidden_states)
        modulation = torch.stack(modulation.unflatten(1, (6, -1)).chunk(2), dim=1)
        of_frames, audio = embedder.causal_audio_encoder(audio_embeds)
        places = {block: place for place, block in enumerate(self.config.audio_inject_layers)}
        is_recomputed = torch.is_grad_enabled() and self.gradient_checkpointing

        def run(module: nn.Module, *inputs: object) -> Tensor:
            result: Tensor = self._gradient_checkpointing_func(module, *inputs) if is_recomputed else module(*inputs)
            return result

        for number, block in enumerate(self.blocks):
            tokens = run(block, tokens, text, modulation, rotary_emb, num_noised)
            if number in places:
                tokens = run(self.audio_injector, tokens, of_frames, audio, places[number], num_noised)

        shift, scale = (self.scale_shift_table + temb[: len(timestep), None]).chunk(2, dim=1)
        tokens = tokens[:, :num_noised]
        tokens = self.proj_out((self.norm_out(tokens.float()) * (1 + scale) + shift).to(tokens.dtype))
        patches = tokens.unflatten(1, size).unflatten(-1, (*self.config.patch_size, -1))
        velocity: Tensor = patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return velocity
