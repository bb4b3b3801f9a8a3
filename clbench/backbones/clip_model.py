"""The backbone with two towers: images and texts to features of one space, from open_clip."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clbench.backbones.backbone import Backbone
from clbench.errors import InputError, RunFailed

__all__ = ["ClipBackbone", "as_clip", "memory_advice"]

Tokenizer = Callable[[list[str]], Tensor]


class ClipBackbone(Backbone):
    """(B, C, H, W) images -> (B, D) features, and with `encode_text` (N, L) tokens -> (N, D): neither normalised.

    scale: exp(logit_scale) of the initial weights, what cosines are multiplied by; a number, no host read later.
    micro_batch, micro_texts: images and texts of one pass; in training the passes are computed again in the backward
        pass, so that only one of them holds its activations. Exact, as no tower has batch statistics.
    """

    def __init__(
        self,
        net: nn.Module,
        tokenizer: Tokenizer,
        *,
        micro_batch: int | None = None,
        micro_texts: int | None = None,
        **facts: Any,
    ) -> None:
        super().__init__(net, **facts)
        self.tokenizer = tokenizer
        self.micro_batch = micro_batch
        self.micro_texts = micro_texts
        scale: Tensor = net.logit_scale  # type: ignore[assignment]  # nn.Module hides the type of attributes
        self.scale = float(scale.detach().exp())
        # Cut to the longest text, a causal tower that reads its feature at the end mark gives the same numbers.
        self.causal = (
            type(net).__name__ == "CLIP"
            and getattr(net, "text_pool_type", None) == "argmax"
            and getattr(net, "attn_mask", None) is not None
        )

    # -- images ----------------------------------------------------------------------------------------------------
    def forward(self, images: Tensor) -> Tensor:
        with memory_advice(self, "images"):
            return in_passes(self._encode_image, images, self.micro_batch, self.training)

    def _encode_image(self, images: Tensor) -> Tensor:
        out: Tensor = self.net.encode_image(images)  # type: ignore[operator]  # nn.Module hides the type of attributes
        return out

    # -- texts -----------------------------------------------------------------------------------------------------
    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (N, L) int64 on the CPU; L is that of the longest text where the model allows it, else its own."""
        tokens = self.tokenizer(list(texts))
        if not self.causal or not len(tokens):
            return tokens
        return tokens[:, : int(tokens.argmax(1).max()) + 1].contiguous()

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(N, L) int64 -> (N, D), not normalised."""
        with memory_advice(self, "texts"):
            return in_passes(self._encode_text, tokens, self.micro_texts, self.training)

    def _encode_text(self, tokens: Tensor) -> Tensor:
        net: Any = self.net
        if not self.causal:
            out: Tensor = net.encode_text(tokens)
            return out
        length = tokens.shape[1]
        x = net.token_embedding(tokens) + net.positional_embedding[:length]
        x = net.ln_final(net.transformer(x, attn_mask=net.attn_mask[:length, :length]))
        last: Tensor = x.take_along_dim(tokens.argmax(1)[:, None, None], 1)[:, 0]
        projection = net.text_projection
        if projection is None:
            return last
        projected: Tensor = projection(last) if isinstance(projection, nn.Linear) else last @ projection
        return projected

    # -- parameters ------------------------------------------------------------------------------------------------
    @property
    def log_scale(self) -> nn.Parameter:
        """ln of what cosines are multiplied by."""
        return self.net.logit_scale  # type: ignore[return-value]  # nn.Module hides the type of attributes

    def image_parameters(self) -> list[nn.Parameter]:
        visual: nn.Module = self.net.visual  # type: ignore[assignment]  # nn.Module hides the type of attributes
        return list(visual.parameters())

    def text_parameters(self) -> list[nn.Parameter]:
        own = {id(p) for p in self.image_parameters()}
        return [p for name, p in self.net.named_parameters() if id(p) not in own and "logit_" not in name]

    def trainable(self) -> list[nn.Parameter]:
        """Both towers, without the scale (and bias) of the logits."""
        return [*self.image_parameters(), *self.text_parameters()]


def in_passes(encode: Callable[[Tensor], Tensor], inputs: Tensor, size: int | None, training: bool) -> Tensor:
    """`encode` in passes of `size` rows; where gradients are wanted, each pass keeps its inputs alone."""
    if size is None or len(inputs) <= size:
        return encode(inputs)
    parts = torch.split(inputs, size)
    if torch.is_grad_enabled() and training:
        return torch.cat([checkpoint(encode, part, use_reentrant=False) for part in parts])
    return torch.cat([encode(part) for part in parts])


@contextmanager
def memory_advice(model: ClipBackbone, what: str) -> Iterator[None]:
    """Turn running out of device memory inside into a sentence that says which setting to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        option, now = ("micro_batch", model.micro_batch) if what == "images" else ("micro_texts", model.micro_texts)
        lower = f"--backbone-set {option}={max(1, now // 2) if now else 16}"
        needs = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        raise RunFailed(
            f"out of memory in {model.name} while encoding {what}{f' ({needs[1]} more were needed)' if needs else ''}: "
            f"lower the passes with {lower}, switch on --backbone-set grad_checkpointing=true or --precision bf16, or "
            f"lower --batch-size"
        ) from error


def as_clip(backbone: nn.Module, method: str) -> ClipBackbone:
    """The backbone as one with a text tower; raises InputError if it has none."""
    if isinstance(backbone, ClipBackbone):
        return backbone
    raise InputError(
        f"{method} compares images with texts, but backbone {getattr(backbone, 'name', type(backbone).__name__)} has "
        f"no text tower: take --backbone clip-small, or a model of open_clip such as clip:ViT-B-16-quickgelu.openai"
    )
