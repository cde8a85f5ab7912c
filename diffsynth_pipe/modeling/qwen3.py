"""The Qwen3 text encoder that FLUX.2-klein and Z-Image share: a chat template, padded, and its inner hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffsynth_pipe.modeling.loading import load_encoder

if TYPE_CHECKING:
    from torch import Tensor, device, dtype

    from diffsynth_pipe.contracts import ComponentFiles

MAX_TOKENS = 512
"""Of the whole conversation; the pipelines pad to it."""


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """The language model and its tokenizer."""

    model: Any
    tokenizer: Any


def load_text_encoder(files: ComponentFiles, dtype: dtype, device: device) -> TextEncoder:
    """Load the language model and its tokenizer."""
    from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

    tokenizer = Qwen2Tokenizer.from_pretrained(files.companions["tokenizer"], local_files_only=True)
    return TextEncoder(load_encoder(Qwen3ForCausalLM, files, dtype, device), tokenizer)


def conversation(tokenizer: Any, prompt: str, *, enable_thinking: bool) -> str:
    """Return the text that is encoded: the prompt in the tokenizer's own chat template."""
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=enable_thinking,
    )
    return text


def hidden_states(encoder: TextEncoder, text: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """Encode one conversation, padded as in the pipelines, whose bits depend on it.

    Returns:
        The hidden states before the first and after each layer, ``[512, channel]`` each, and which of the rows are
        text, bool ``[512]``.
    """
    tokens = encoder.tokenizer(
        text,
        add_special_tokens=False,
        padding="max_length",
        max_length=MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    ).to(encoder.model.device)
    # The inner model: the language head's logits over 152k tokens are of no use here.
    output = encoder.model.model(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True, use_cache=False
    )
    return tuple(state[0] for state in output.hidden_states), tokens.attention_mask[0].bool()


def tiny_text_encoder(*, hidden_size: int, num_layers: int) -> tuple[Any, Any]:
    """Build the language model at the smallest size, and a byte-level tokenizer with a short chat template."""
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        ["user assistant think"],
        vocab_size=300,
        new_special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    pad_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        bos_token_id=pad_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=pad_token_id,
    )
    return Qwen3ForCausalLM(config), tokenizer
