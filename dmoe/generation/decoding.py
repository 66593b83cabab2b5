"""Continues prompts with a model, all in one batch. Called by `dmoe generate` and after training.

Prompts of different lengths are padded on the left, so that the newest token of every sequence is
in the last column. Padding is a document of its own: no token looks at it and no expert gets it.
Shapes: B sequences, S columns of the forward pass, V vocabulary, N new tokens.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.config.base import ConfigError
from dmoe.data import Tokenizer
from dmoe.generation.sampling import SamplingConfig, draws, sample_next
from dmoe.generation.text import TextStream
from dmoe.models import DecoderLM, ModelInputs
from dmoe.models.attention import KVCache
from dmoe.parallel import all_reduce_sum

FinishReason = Literal["stop", "length", "end_of_document"]


@dataclass(frozen=True)
class Generation:
    """The continuation of one prompt."""

    text: str
    """Without the prompt and without the stop string."""
    tokens: list[int]
    """The new tokens: those of the stop string included, the end-of-document token not."""
    finish_reason: FinishReason
    """What ended it: a stop string, `max_new_tokens`, or the model's end-of-document token."""
    seconds: float
    """From the call to the end of this continuation."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second of the call, which also read the prompts."""
        return len(self.tokens) / self.seconds


@torch.no_grad()
def generate(
    model: DecoderLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: SamplingConfig,
    *,
    on_text: Callable[[int, str], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[Generation]:
    """Continue each prompt; rounding aside, no continuation depends on the rest of the batch.

    That does not hold for experts with a capacity, which the tokens of a batch share, nor where
    experts choose, nor for the forced-balance router.

    Args:
        model: any decoder.
        tokenizer: the one it was trained with.
        prompts: texts to continue.
        sampling: how.
        on_text: called with the number of a prompt and each new piece of its continuation.
        group: where several ranks hold the model, those ranks; all of them make the same call.

    Returns:
        One continuation a prompt, in their order.

    Raises:
        ConfigError: a prompt that is empty or too long, or a tokenizer that is not the model's.
        FloatingPointError: the model's logits are not finite.
    """
    began = time.perf_counter()
    prompt_ids = _encode(model, tokenizer, prompts, sampling)
    if not prompts:
        return []
    device = model.embed.weight.device
    tokens_BS, document_ids_BS = _pad_left(prompt_ids, device)
    positions_BS = ((document_ids_BS == 0).cumsum(1) - 1).clamp(min=0)
    caches = _allocate(model, len(prompts), tokens_BS.shape[1] + sampling.max_new_tokens, device)
    uniform_BN = draws(prompts, sampling).to(device)
    continuations = [_Continuation(tokenizer, ids, sampling, began) for ids in prompt_ids]
    for uniform_B in uniform_BN.unbind(1):
        inputs = ModelInputs(tokens_BS, positions_BS, document_ids_BS)
        logits_BV = model(inputs, caches=caches, last_only=True).logits[:, 0]
        # A vocabulary may be padded to a round size, with ids that mean nothing.
        logits_BV = logits_BV[:, : tokenizer.vocab_size]
        if not logits_BV.isfinite().all():
            raise FloatingPointError("the model's logits are not finite: its weights are damaged")
        next_B = _agree(sample_next(logits_BV, uniform_B, sampling), group)
        for index, (continuation, token) in enumerate(
            zip(continuations, next_B.tolist(), strict=True)
        ):
            if continuation.running:
                piece = continuation.push(token)
                if piece and on_text is not None:
                    on_text(index, piece)
        running_B = torch.tensor([continuation.running for continuation in continuations])
        if not running_B.any():
            break
        # What has ended stays in the batch as padding.
        document_ids_B1 = (running_B.long() - 1)[:, None].to(device)
        tokens_BS, positions_BS = next_B[:, None], positions_BS[:, -1:] + 1
        document_ids_BS = torch.cat((document_ids_BS, document_ids_B1), dim=1)
    return [continuation.result() for continuation in continuations]


class _Continuation:
    """One sequence of the batch on its way."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: list[int], sampling: SamplingConfig, began: float
    ):
        self._stream = TextStream(tokenizer, prompt_ids, sampling.stop)
        self._tokens: list[int] = []
        self._finish_reason: FinishReason | None = None
        self._eod_id, self._max_new_tokens = tokenizer.eod_id, sampling.max_new_tokens
        self._began, self._seconds = began, 0.0

    @property
    def running(self) -> bool:
        """Whether more tokens are wanted."""
        return self._finish_reason is None

    def push(self, token: int) -> str:
        """Add a token, or end with it, and return the new text that is certain."""
        if token == self._eod_id:
            self._end("end_of_document")
        else:
            self._tokens.append(token)
            self._stream.push(token)
            if self._stream.stopped or len(self._tokens) == self._max_new_tokens:
                self._end("length")
        return self._stream.take(final=not self.running)

    def result(self) -> Generation:
        """Return the continuation, once it has ended."""
        assert self._finish_reason is not None
        return Generation(self._stream.text, self._tokens, self._finish_reason, self._seconds)

    def _end(self, reason: FinishReason) -> None:
        self._stream.finish()
        self._finish_reason = "stop" if self._stream.stopped else reason
        self._seconds = time.perf_counter() - self._began


def _encode(
    model: DecoderLM, tokenizer: Tokenizer, prompts: Sequence[str], sampling: SamplingConfig
) -> list[list[int]]:
    """Return the token ids of each prompt, none empty and none too long."""
    config, max_new_tokens = model.config, sampling.max_new_tokens
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer {tokenizer.spec} has {tokenizer.vocab_size} ids, but the model has "
            f"model.vocab_size = {config.vocab_size}: use the tokenizer it was trained with"
        )
    prompt_ids = [ids.tolist() for ids in tokenizer.encode_batch(prompts)]
    for index, ids in enumerate(prompt_ids):
        if not ids:
            raise ConfigError(
                f"prompt {index} is empty: the model continues a text, so give at least one token"
            )
        if len(ids) + max_new_tokens > config.max_seq_len:
            raise ConfigError(
                f"prompt {index} has {len(ids)} tokens, which with max_new_tokens = "
                f"{max_new_tokens} is more than model.max_seq_len = {config.max_seq_len}: shorten "
                f"the prompt or lower max_new_tokens"
            )
    return prompt_ids


def _pad_left(prompt_ids: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (B, S) tokens, and (B, S) document ids: 0 for a prompt and -1 for the padding."""
    longest = max(map(len, prompt_ids))
    tokens_BS = torch.zeros(len(prompt_ids), longest, dtype=torch.int64)
    document_ids_BS = torch.full_like(tokens_BS, -1)
    for row, ids in enumerate(prompt_ids):
        tokens_BS[row, longest - len(ids) :] = torch.tensor(ids)
        document_ids_BS[row, longest - len(ids) :] = 0
    return tokens_BS.to(device), document_ids_BS.to(device)


def _allocate(
    model: DecoderLM, batch_size: int, max_len: int, device: torch.device
) -> list[KVCache]:
    """Return an empty cache for each layer."""
    return [
        KVCache.allocate(
            model.config,
            batch_size=batch_size,
            max_len=max_len,
            dtype=model.compute_dtype,
            device=device,
        )
        for _ in model.blocks
    ]


def _agree(next_B: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the first rank's tokens: one that differed in a rounding would part the ranks."""
    if group is not None and group.rank() != 0:
        next_B = torch.zeros_like(next_B)
    return all_reduce_sum(next_B, group)
