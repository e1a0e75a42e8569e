"""Generation on a Transformers model with the method simulated by masks.

The model's own layers run unchanged; only the attention function is replaced. Keys and values of
every position stay in place for ever and each KV head carries the set of prompt positions that it
may still see. Works for models whose attention goes through Transformers' attention interface and
whose layers are all causal full attention (Llama, Qwen2, Qwen3, Mistral without a window).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from hetero_sglang.simulation.method import (
    PIVOT,
    Budget,
    Method,
    Profile,
    best_first,
    boundary_margin,
    head_budgets,
    median,
    overlap,
    pooled_scores,
    protect,
    quantise,
    window_scores,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

ATTENTION_NAME = "heterocache_simulation"
MAX_WINDOW = 64
"""Queries of a prompt that are kept for selection."""

Head = tuple[int, int]
"""(layer, KV head)."""
Event = tuple[int, int, int]
"""(step, layer, KV head); step 0 is the prefill."""


@dataclass(frozen=True)
class Selection:
    """The prompt positions that one compressed head sees from a step on."""

    step: int
    layer: int
    head: int
    positions: Tensor = field(repr=False)
    """int64 [budget], ascending."""
    margin: float
    """Relative score gap at the boundary of the set; about 1e-6 is beyond fp32's certainty."""


@dataclass(frozen=True)
class DriftCheck:
    """One look at whether a pivot still attends where its reference set says."""

    step: int
    layer: int
    pivot: int
    overlaps: tuple[float, ...]
    has_drifted: bool
    distance: float
    """How far the median overlap is from the threshold, in positions of the reference set."""
    reference: Tensor = field(repr=False)
    """The set in force after the check, int64 [K], best first."""


@dataclass(frozen=True)
class Look:
    """What a pivot looks at in a check, for studies that decide it otherwise."""

    step: int
    layer: int
    pivot: int
    keys: Tensor = field(repr=False)
    """The prompt's exact keys, fp32 [N, D]."""
    scale: float
    reference_queries: Tensor = field(repr=False)
    """Queries of the group by which the reference set was made, fp32 [G, D]."""
    queries: Tensor = field(repr=False)
    """The last S steps' queries, oldest first, fp32 [S, G, D]."""
    size: int
    """Positions of the sets, K."""
    has_drifted: bool


@dataclass
class Trace:
    """All that a simulated request did."""

    num_prompt: int
    budget: Budget
    tokens: list[int] = field(default_factory=list)
    """The simulation's own choice at every step, whatever the context was forced to."""
    gaps: list[float] = field(default_factory=list)
    """Logit of the choice minus that of the runner-up."""
    deficits: list[float] = field(default_factory=list)
    """Logit of the choice minus that of the forced token (0 where they agree)."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of the forced token, of the choice where nothing is forced."""
    distributions: list[Tensor] = field(default_factory=list, repr=False)
    """Log-probabilities of all tokens at every step, fp32 [vocab] each; only if asked for."""
    selections: list[Selection] = field(default_factory=list)
    checks: list[DriftCheck] = field(default_factory=list)

    @property
    def num_drifts(self) -> int:
        """Checks that ended in a refresh of the pivot's satellites."""
        return sum(check.has_drifted for check in self.checks)

    def selection(self, layer: int, head: int, *, step: int) -> Selection:
        """The set of a head that is in force when ``step`` ends (0: after the prefill)."""
        matching = [s for s in self.selections if (s.layer, s.head) == (layer, head)]
        return max((s for s in matching if s.step <= step), key=lambda s: s.step)


@dataclass
class _Layer:
    """Keys, values and masks of one layer; capacity is prompt + generated tokens."""

    keys: Tensor  # [H, capacity, D]
    values: Tensor  # [H, capacity, D]
    is_visible: Tensor  # bool [H, capacity]

    @classmethod
    def empty_like(cls, rows: Tensor, capacity: int) -> _Layer:
        """A layer with room for ``capacity`` rows like ``rows`` [H, n, D], all visible."""
        shape = (rows.shape[0], capacity, rows.shape[2])
        visible = torch.ones(shape[:2], dtype=torch.bool, device=rows.device)
        return cls(rows.new_empty(shape), rows.new_empty(shape), visible)


class _Attention:
    """State of one request, handed to the attention function through the model's kwargs."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.layers: list[_Layer | None] = [None] * num_layers
        self.length = 0
        self.queries: list[Tensor | None] = [None] * num_layers  # newest chunk, [H, n, G, D]
        self.scale = 0.0

    def layer(self, index: int) -> _Layer:
        """Layer ``index``, which has seen its first rows."""
        layer = self.layers[index]
        assert layer is not None
        return layer

    def copy(self, capacity: int) -> _Attention:
        """The same state in memory of its own, with room for ``capacity`` rows."""
        other = _Attention(len(self.layers), capacity)
        other.length, other.queries, other.scale = self.length, list(self.queries), self.scale
        for index in range(len(self.layers)):
            mine = self.layer(index)
            other.layers[index] = new = _Layer.empty_like(mine.keys, capacity)
            new.keys[:, : self.length] = mine.keys[:, : self.length]
            new.values[:, : self.length] = mine.values[:, : self.length]
        return other

    def forward(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Append the rows of one chunk and attend; all [heads, n, D], the result too."""
        num_heads, num_new, head_dim = key.shape
        group = query.shape[0] // num_heads
        self.scale = scale
        layer = self.layers[index]
        if layer is None:
            layer = self.layers[index] = _Layer.empty_like(key, self.capacity)
        start, end = self.length, self.length + num_new
        layer.keys[:, start:end] = key
        layer.values[:, start:end] = value
        queries = query.view(num_heads, group, num_new, head_dim).transpose(1, 2)
        # Of a prompt only the last queries are ever looked at.
        self.queries[index] = queries if start else queries[:, -MAX_WINDOW:].clone()
        if start == 0:
            return F.scaled_dot_product_attention(
                query[None], key[None], value[None], is_causal=True, scale=scale, enable_gqa=True
            )[0]
        rows = query.reshape(num_heads, group * num_new, head_dim)
        scores = torch.bmm(rows, layer.keys[:, :end].transpose(1, 2)) * scale
        scores = scores.view(num_heads, group, num_new, end)
        is_past = torch.ones(num_new, end, dtype=torch.bool, device=key.device).tril(start)
        allowed = layer.is_visible[:, None, :end] & is_past  # [H, n, end]
        scores = scores.masked_fill(~allowed[:, None], -math.inf)
        weights = torch.softmax(scores, dim=-1).view(num_heads, group * num_new, end)
        return torch.bmm(weights, layer.values[:, :end]).view(-1, num_new, head_dim)


def _attention_function(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    simulation: _Attention,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: [1, heads, n, D] in, [1, n, heads, D] out."""
    assert attention_mask is None
    if kwargs.get("sliding_window"):
        raise ValueError("the simulation knows no sliding window")
    out = simulation.forward(module.layer_idx, query[0], key[0], value[0], scaling)
    return out.transpose(0, 1)[None], None


AttentionInterface.register(ATTENTION_NAME, _attention_function)


@dataclass(frozen=True)
class Prefill:
    """A prompt after full attention: the same whatever the method's settings are."""

    num_prompt: int
    logits: Tensor = field(repr=False)
    """Logits after the last prompt token, fp32 [1, vocab]."""
    state: _Attention = field(repr=False)


@torch.inference_mode()
def prefill(model: PreTrainedModel, prompt: Sequence[int]) -> Prefill:
    """Run a prompt through the model once; any number of simulations may start from it."""
    state = _Attention(model.config.num_hidden_layers, len(prompt))
    return Prefill(len(prompt), _forward(model, state, prompt), state)


def _forward(model: PreTrainedModel, state: _Attention, tokens: Sequence[int]) -> Tensor:
    """Logits after each of ``tokens`` ([n, vocab]; of a prompt the last one only)."""
    start = state.length
    restore = model.config._attn_implementation  # noqa: SLF001  # has a setter, but no getter
    model.set_attn_implementation(ATTENTION_NAME)
    try:
        output = model(
            input_ids=torch.tensor([list(tokens)], device=model.device),
            position_ids=torch.arange(start, start + len(tokens), device=model.device)[None],
            use_cache=False,
            logits_to_keep=1 if start == 0 else 0,
            simulation=state,
        )
    finally:
        model.set_attn_implementation(restore)
    state.length += len(tokens)
    logits: Tensor = output.logits[0].float()
    return logits


def _with_swap(order: Tensor, count: int) -> Tensor:
    """The order with the last of the first ``count`` and the one after it exchanged."""
    swapped = order.clone()
    swapped[[count - 1, count]] = order[[count, count - 1]]
    return swapped


class Simulation:
    """Simulates requests on one model, one profile and one set of settings.

    Args:
        model: A causal LM of Transformers in evaluation mode, fp32.
        profile: The head profile.
        method: The settings.
        swapped: Selections whose last position is replaced by the runner-up, to see what a
            near-tie decided the other way would change.
        inverted: Drift checks whose verdict is inverted, for the same purpose.
        observer: Called with every drift check.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        profile: Profile,
        method: Method,
        *,
        swapped: Collection[Event] = (),
        inverted: Collection[Event] = (),
        observer: Callable[[Look], None] | None = None,
    ) -> None:
        self._model = model
        self._profile = profile
        self._method = method
        self._swapped = frozenset(swapped)
        self._inverted = frozenset(inverted)
        self._observer = observer
        self._watched: dict[Head, Tensor] = {}
        self._reference_queries: dict[Head, Tensor] = {}
        self._with_distributions = False

    def variant(
        self, *, swapped: Collection[Event] = (), inverted: Collection[Event] = ()
    ) -> Simulation:
        """The same simulation with some near-ties decided the other way."""
        return Simulation(
            self._model, self._profile, self._method, swapped=swapped, inverted=inverted
        )

    def generate(self, prompt: Prefill, num_tokens: int) -> Trace:
        """Greedy generation of exactly ``num_tokens`` tokens, end-of-text ignored."""
        return self._run(prompt, num_tokens, None)

    def follow(
        self, prompt: Prefill, tokens: Sequence[int], *, with_distributions: bool = False
    ) -> Trace:
        """Greedy choices when the context is forced to be ``tokens``.

        If every choice equals the forced token, ``generate`` would have made the same tokens.
        """
        return self._run(prompt, len(tokens), list(tokens), with_distributions)

    @torch.inference_mode()
    def _run(
        self,
        prompt: Prefill,
        num_tokens: int,
        forced: list[int] | None,
        with_distributions: bool = False,
    ) -> Trace:
        num_prompt, interval = prompt.num_prompt, self._method.drift_interval
        head_dim = prompt.state.layer(0).keys.shape[-1]
        trace = Trace(num_prompt, head_budgets(self._profile, self._method, num_prompt, head_dim))
        state = prompt.state.copy(num_prompt + num_tokens)
        self._with_distributions = with_distributions
        self._choose(trace, prompt.logits, forced)
        self._watched.clear()
        references = self._select(trace, state)
        recent: dict[Head, list[Tensor]] = {head: [] for head in references}
        landing: dict[int, list[tuple[int, int, Tensor]]] = {}
        step = 0
        while step < num_tokens - 1:
            # Nothing changes until the next check or landing, so forced tokens go in one pass.
            until = min([num_tokens - 1, (step // interval + 1) * interval, *landing])
            stop = until if forced is not None else step + 1
            chunk = (forced or trace.tokens)[step:stop]
            self._choose(trace, _forward(self._model, state, chunk), forced)
            step = stop
            for (layer, head), queries in recent.items():
                newest = state.queries[layer]
                assert newest is not None
                queries.extend(newest[head])
            if step % interval == 0:
                refreshed = self._check_drift(trace, state, references, recent, step)
                landing[step + self._method.landing_steps] = refreshed
                for queries in recent.values():
                    queries.clear()
            for layer, head, scores in landing.pop(step, ()):
                self._keep(trace, state, step, layer, head, scores)
        return trace

    def _choose(self, trace: Trace, logits: Tensor, forced: list[int] | None) -> None:
        for row in logits:
            best = row.topk(2)
            token = int(best.indices[0])
            wanted = token if forced is None else forced[len(trace.tokens)]
            trace.deficits.append((best.values[0] - row[wanted]).item())
            trace.gaps.append((best.values[0] - best.values[1]).item())
            trace.logprobs.append((row[wanted] - row.logsumexp(0)).item())
            if self._with_distributions:
                trace.distributions.append(row.log_softmax(0))
            trace.tokens.append(token)

    def _select(self, trace: Trace, state: _Attention) -> dict[Head, Tensor]:
        """First selection of every compressed head; returns the pivots' reference sets."""
        references: dict[Head, Tensor] = {}
        if trace.budget.keeps_all:
            return references
        num, window = trace.num_prompt, min(self._method.window, trace.num_prompt)
        if self._method.is_retrieving:
            for layer, head in self._profile.heads(PIVOT):
                keys = state.layer(layer).keys[head, :num]
                if self._method.has_budgeted_pivots:
                    keys = quantise(keys, self._method.watched_bits)
                self._watched[layer, head] = keys
                queries = self._queries(state, layer)[head, -1]
                self._reference_queries[layer, head] = queries
                scores = pooled_scores(queries, keys, state.scale)
                references[layer, head] = best_first(scores)[: max(1, trace.budget.base)]
        for layer, head in trace.budget.tokens:
            keys = state.layer(layer).keys[head, :num]
            queries = self._queries(state, layer)[head]
            if self._method.window == 1:
                scores = pooled_scores(queries[-1], keys, state.scale)
            else:
                scores = window_scores(queries[-window:], keys, state.scale)
            self._keep(trace, state, 0, layer, head, scores)
        return references

    @staticmethod
    def _queries(state: _Attention, layer: int) -> Tensor:
        queries = state.queries[layer]
        assert queries is not None
        return queries

    def _keep(
        self, trace: Trace, state: _Attention, step: int, layer: int, head: int, scores: Tensor
    ) -> None:
        """Let a head see its best positions by ``scores`` and no other prompt position."""
        budget = trace.budget.tokens[layer, head]
        scores = protect(scores, self._method.window)
        is_swapped = (step, layer, head) in self._swapped
        is_visible = state.layer(layer).is_visible[head]
        order = best_first(scores)
        # Of a refreshed head the pivot's best, then what it held; each by the pivot's scores.
        num_best = math.ceil(self._method.refresh_share * budget) if step else budget
        margin = boundary_margin(scores, order, num_best)
        rest = order[num_best:][is_visible[order[num_best:]]]
        if step and num_best + len(rest) > budget > num_best:
            margin_of_rest = boundary_margin(scores, rest, budget - num_best)
            if margin_of_rest < margin:
                margin, is_swapped_there = margin_of_rest, is_swapped
                is_swapped = False
                if is_swapped_there:
                    rest = _with_swap(rest, budget - num_best)
        if is_swapped and num_best < trace.num_prompt:
            order = _with_swap(order, num_best)
            rest = order[num_best:][is_visible[order[num_best:]]]
        chosen = torch.cat([order[:num_best], rest])[:budget] if step else order[:budget]
        is_visible[: trace.num_prompt] = False
        is_visible[chosen] = True
        trace.selections.append(Selection(step, layer, head, chosen.sort().values, margin))

    def _check_drift(
        self,
        trace: Trace,
        state: _Attention,
        references: dict[Head, Tensor],
        recent: dict[Head, list[Tensor]],
        step: int,
    ) -> list[tuple[int, int, Tensor]]:
        """Check every pivot; the heads to refresh, as (layer, head, scores)."""
        refreshed: list[tuple[int, int, Tensor]] = []
        threshold = self._method.drift_threshold
        for (layer, head), reference in references.items():
            keys = self._watched[layer, head]
            scores = pooled_scores(torch.stack(recent[layer, head]), keys, state.scale)  # [S, N]
            orders = best_first(scores)[:, : len(reference)]
            overlaps = tuple(overlap(reference, order) for order in orders)
            middle = median(list(overlaps))
            has_drifted = (middle < threshold) != ((step, layer, head) in self._inverted)
            self._observe(trace, state, step, (layer, head), recent, len(reference), has_drifted)
            if has_drifted:
                references[layer, head] = orders[-1]
                self._reference_queries[layer, head] = recent[layer, head][-1]
                followers = self._profile.satellites_of.get((layer, head), ())
                if self._method.has_budgeted_pivots:
                    followers = (head, *followers)
                refreshed += [(layer, follower, scores[-1]) for follower in followers]
            trace.checks.append(
                DriftCheck(
                    step,
                    layer,
                    head,
                    overlaps,
                    has_drifted,
                    abs(middle - threshold) * len(reference),
                    references[layer, head],
                )
            )
        return refreshed

    def _observe(
        self,
        trace: Trace,
        state: _Attention,
        step: int,
        pivot: Head,
        recent: dict[Head, list[Tensor]],
        size: int,
        has_drifted: bool,
    ) -> None:
        if self._observer is None:
            return
        layer, head = pivot
        self._observer(
            Look(
                step,
                layer,
                head,
                state.layer(layer).keys[head, : trace.num_prompt],
                state.scale,
                self._reference_queries[pivot],
                torch.stack(recent[pivot]),
                size,
                has_drifted,
            )
        )
