"""Hidden states of a model of transformers, layer by layer, and their geometry.

Suffixes: S sequences, B batch, L length, N tokens, D dim of a state, P pairs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TYPE_CHECKING

import torch
from torch import nn, Tensor
from torch.nn.utils.rnn import pad_sequence

from nitp_titan.geometry.statistics import describe, Moments, sample_pairs
from nitp_titan.objectives.sites import HIDDEN, layer_site

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Collector:
    """Sums the states of batches: dim^2 numbers per state and the states of the pairs, however long the text.

    Args:
        pairs: from `sample_pairs`.
    """

    def __init__(self, pairs: tuple[Tensor, Tensor]):
        self.sequences, self.positions = pairs
        self.moments: dict[str, Moments] = {}
        self.pair_states: dict[str, Tensor] = {}

    def expect(self, first_sequence: int, valid_BL: Tensor) -> None:
        """Announce a batch of consecutive sequences and which of its tokens are no padding."""
        self.valid_BL = valid_BL
        rows = self.sequences - first_sequence
        self.slots = ((rows >= 0) & (rows < len(valid_BL))).nonzero().flatten()
        self.rows, self.columns = rows[self.slots], self.positions[self.slots]

    def see(self, state: str, x_BLD: Tensor) -> None:
        """Take in a state of the batch, [batch, length, dim]; anything else is passed over."""
        if not isinstance(x_BLD, Tensor) or x_BLD.dim() != 3 or x_BLD.shape[:2] != self.valid_BL.shape:
            return
        device, dim = x_BLD.device, x_BLD.shape[-1]
        if state not in self.moments:
            self.moments[state] = Moments.zeros(dim, device)
            self.pair_states[state] = torch.zeros(len(self.sequences), dim, device=device)
        x_ND = x_BLD[self.valid_BL.to(device)]
        self.moments[state].add(x_ND, torch.ones(len(x_ND), dtype=torch.bool, device=device))
        slots, rows, columns = (index.to(device) for index in (self.slots, self.rows, self.columns))
        self.pair_states[state].index_copy_(0, slots, x_BLD[rows, columns].float())

    def stats(self, state: str, num_tokens: int) -> dict[str, Any]:
        """Statistics of `geometry.describe`.

        Raises:
            ValueError: saying why there are none.
        """
        if state not in self.moments:
            raise ValueError("the model does not show it as [batch, length, dim]")
        if (seen := int(self.moments[state].counts[0])) != num_tokens:
            raise ValueError(f"seen at {seen:,} tokens, not {num_tokens:,}")
        first_PD, second_PD = self.pair_states[state].chunk(2)
        every_P = torch.ones(len(first_PD), dtype=torch.bool, device=first_PD.device)
        try:
            found = describe(self.moments[state], (first_PD, second_PD, every_P))
        except torch.linalg.LinAlgError as error:
            raise ValueError(str(error)) from error
        if found is None:
            raise ValueError("not finite")
        return found


def decoder_layers(decoder: nn.Module) -> Sequence[nn.Module]:
    """Blocks of a decoder: its first, outermost list of ``num_hidden_layers`` modules; none if there is no such list.

    ``hidden_states`` of transformers is no way to them: its last entry is the state after the final norm.
    """
    number = getattr(decoder.config.get_text_config(), "num_hidden_layers", None)
    lists = (module for module in decoder.modules() if isinstance(module, nn.ModuleList))
    return next((blocks for blocks in lists if len(blocks) == number), ())


@contextmanager
def _watched(layers: Sequence[nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show what enters the first layer, and what leaves each, to ``see``."""

    def enters(module: nn.Module, args: tuple, kwargs: dict) -> None:
        see(layer_site(0), args[0] if args else kwargs.get("hidden_states"))

    def leaves(state: str) -> Callable:
        return lambda module, args, output: see(state, output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_pre_hook(enters, with_kwargs=True) for layer in layers[:1]]
    hooks += [layer.register_forward_hook(leaves(layer_site(n))) for n, layer in enumerate(layers, start=1)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def measure(
    model: "PreTrainedModel",
    sequences: Sequence[Tensor],
    *,
    batch_size: int,
    num_pairs: int,
    seed: int = 0,
    count_tokens: Callable[[int], None] = lambda tokens: None,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Geometry of a model's states over all tokens of some sequences. The logits are not computed.

    Args:
        sequences: token ids, [length] each, at least two that are not empty; padded on the right, batch by batch.
        batch_size: sequences at a time; it does not change the stats.
        count_tokens: called with the number of tokens of every batch.

    Returns:
        State -> stats of `geometry.describe`: ``hidden`` is the state that the unembedding reads (after the final
        norm), ``layer_0`` what enters the first block, ``layer_1`` and on the raw residual stream after each. And why
        a state is left out, a line each.
    """
    decoder = model.get_decoder()
    layers = decoder_layers(decoder)
    lengths_S = torch.tensor([len(ids) for ids in sequences])
    collector = Collector(sample_pairs(lengths_S, num_pairs, seed))
    with _watched(layers, collector.see):
        for start in range(0, len(sequences), batch_size):
            ids_BL = pad_sequence([ids.long() for ids in sequences[start : start + batch_size]], batch_first=True)
            valid_BL = torch.arange(ids_BL.shape[1]) < lengths_S[start : start + batch_size, None]
            if not valid_BL.any():
                continue
            collector.expect(start, valid_BL)
            inputs = {"input_ids": ids_BL.to(model.device), "attention_mask": valid_BL.long().to(model.device)}
            collector.see(HIDDEN, decoder(**inputs, use_cache=False).last_hidden_state)
            count_tokens(int(valid_BL.sum()))
    names = [HIDDEN, *(layer_site(number) for number in range(len(layers) + 1) if layers)]
    left_out = [] if layers else ["its layers are not in a list of num_hidden_layers modules; left out."]
    states = {}
    for name in names:
        try:
            states[name] = collector.stats(name, int(lengths_S.sum()))
        except ValueError as reason:
            left_out.append(f"{name}: {reason}; left out.")
    return states, left_out
