"""Runs the discrete hybrids of a supernet on the supernet's own modules, sharing what their choices share."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ..building.calibrate import Problem, _fit
from ..building.states import Batch, ComponentStates
from ..mixing_manticore import Boundary, End, Junction, Projector, junctions
from ..slicing_manticore import run_head, run_view


Choice = tuple[int, ...]
Place = tuple[int, int]  # block, path with a component
Told = Callable[[dict[Choice, float]], None]


class SliceRunner:
    """
    The slices, stems and heads of a supernet, joined one to one by bridges as `discretize` joins them: an end that
    continues the other is joined directly, any two others by one linear map d_source -> d_target. Slices, junctions
    and projectors are those that run a hybrid.

    Args:
        model: a hybrid with heads; its mixture weights and its own projectors play no part.
        paths: path indices that each block may use.
    """

    def __init__(self, model: PreTrainedModel, paths: list[list[int]]):
        self.model, self.config, self.paths = model, model.config, paths
        self.blocks = len(self.config.blocks)
        plan = junctions(self.config)
        real = [self.config.real_paths(b) for b in range(self.blocks)]
        self._exits = {(b, p): end for b in range(self.blocks) for p, end in zip(real[b], plan[b + 1].sources)}
        self._entries = {(b, p): end for b in range(self.blocks) for p, end in zip(real[b], plan[b].targets)}
        self._stems = {end.component: end for end in plan[0].sources}
        self._heads = {end.component: end for end in plan[-1].targets}
        self._joints: dict[tuple[End, End], Junction] = {}
        self.bridges: dict[tuple[End, End], Projector] = {}
        self.states = ComponentStates(self.config, [model])

    # ------------------------------------------------------------------ what is joined with what
    def ends(self, before: Place | None, after: Place | None) -> tuple[End, End]:
        """The two ends that meet between two paths; None is the stem of the second or the head of the first."""
        target = None if after is None else self._entries[after]
        source = self._stems[target.component] if before is None else self._exits[before]
        return source, self._heads[source.component] if target is None else target

    def last(self, choice: Sequence[int]) -> Place | None:
        """The last path with a component of the beginning of a choice, None at the stem."""
        return next(((b, p) for b, p in reversed(list(enumerate(choice))) if (b, p) in self._exits), None)

    def joint(self, pair: tuple[End, End]) -> Junction:
        """The junction of two ends."""
        if pair not in self._joints:
            self._joints[pair] = Junction([pair[0]], [pair[1]], self.config, False)
        return self._joints[pair]

    def needs_bridge(self, pair: tuple[End, End]) -> bool:
        """Whether two ends are joined by a map, or directly."""
        return self.joint(pair).has_in[0]

    def pairs(self) -> list[tuple[End, End]]:
        """All pairs of ends that the choices join, in order of depth, each once."""
        found: dict[tuple[End, End], None] = {}
        reached: list[Place | None] = [None]
        for depth, paths in enumerate(self.paths):
            real = [(depth, q) for q in paths if (depth, q) in self._entries]
            found |= {self.ends(before, after): None for before in reached for after in real}
            reached = real + (reached if len(real) < len(paths) else [])
        found |= {self.ends(before, None): None for before in reached}
        return list(found)

    def fresh_bridge(self, pair: tuple[End, End]) -> Projector:
        """A bridge without values, on the device and in the dtype of the model."""
        return self.joint(pair).in_projectors()[0].to(device=self.model.device, dtype=self.model.dtype)

    def components_needed(self) -> set[int]:
        """Components whose own hidden states a calibration of the bridges reads."""
        return {end.component for pair in self.pairs() if self.needs_bridge(pair) for end in pair}

    # ------------------------------------------------------------------ the steps of a forward pass
    def start(self, batch: Batch, p: int) -> torch.Tensor:
        """The stem of path p of the first block, (batch, tokens, d)."""
        stem = self.model.trunk.stems[str(self.config.blocks[0][p]["component"])]
        return run_view(
            stem, input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
        )

    def cross(self, pair: tuple[End, End], state: torch.Tensor, bridge: Projector | None) -> torch.Tensor:
        """(batch, tokens, d_source) -> (batch, tokens, d_target)."""
        joint = self.joint(pair)
        return joint.receive(Boundary([state], [None], [1.0]), [bridge], [1.0], False)[0]

    def slice(self, batch: Batch, depth: int, p: int, state: torch.Tensor) -> torch.Tensor:
        """Path p of block `depth`, (batch, tokens, d) -> (batch, tokens, d)."""
        view = self.model.trunk.blocks[depth].paths[p].slice
        return run_view(
            view, inputs_embeds=state, attention_mask=batch.attention_mask, position_ids=batch.position_ids
        )

    def loss(self, batch: Batch, component: int, state: torch.Tensor) -> float:
        """Summed next-token loss in nats of the head of a component."""
        return summed_loss(run_head(self.model.heads[str(component)], state), batch)[0]

    # ------------------------------------------------------------------ bridges from the components' own states
    def fit_bridges(self, batches: list[Batch], progress: bool) -> dict[str, float]:
        """
        Fit every bridge once: ridge regressions from one component's own state to the other's, all in one pass.

        Returns:
            the held-out fit (R^2) of every bridge by name, `a@3 -> b@3`.
        """
        wanted: dict[int, set] = {}

        def own(end: End):
            wanted.setdefault(end.component, set()).add(end.position)

            def read(given):
                batch, memory = given
                if end.component not in memory:
                    memory[end.component] = self.states.run(end.component, batch, wanted[end.component])
                return memory[end.component][end.position]

            return read

        problems = []
        for pair in self.pairs():
            if self.needs_bridge(pair):
                self.bridges[pair] = self.fresh_bridge(pair)
                source, target = own(pair[0]), own(pair[1])
                problems.append(
                    Problem(
                        bridge_name(pair),
                        self.bridges[pair],
                        lambda given, source=source, target=target: (source(given), target(given)),
                    )
                )
        fits = _fit(problems, batches, token_count(batches), progress) if problems else []
        return {fit.projector: fit.fit for fit in fits}

    # ------------------------------------------------------------------ losses of many choices
    @torch.inference_mode()
    def losses(self, choices: Iterable[Choice], batches: list[Batch], told: Told) -> dict[Choice, float]:
        """
        Mean next-token loss in nats of every choice with the fitted bridges. Batch by batch, depth first over the tree
        of choices: a choice costs the slices that it does not share with the one before, and memory holds one state
        per depth. `told` is called after every batch with the running means.
        """
        tree = tree_of(choices)
        sums: dict[Choice, float] = {}
        tokens = 0

        def descend(batch, depth, branch, before, state):
            if depth == self.blocks:
                pair = self.ends(self.last(before), None)
                entered = self.cross(pair, state, self.bridges.get(pair))
                sums[before] = sums.get(before, 0.0) + self.loss(batch, pair[1].component, entered)
                return
            for p, below in branch.items():
                if (depth, p) not in self._entries:
                    descend(batch, depth + 1, below, (*before, p), state)
                    continue
                pair = self.ends(self.last(before), (depth, p))
                given = self.start(batch, p) if depth == 0 else state
                entered = self.cross(pair, given, self.bridges.get(pair))
                descend(batch, depth + 1, below, (*before, p), self.slice(batch, depth, p, entered))

        for batch in batches:
            descend(batch, 0, tree, (), None)
            tokens += target_count(batch)
            told({choice: total / tokens for choice, total in sums.items()})
        return {choice: total / tokens for choice, total in sums.items()}

    @torch.no_grad()
    def losses_in_order(
        self, choices: Iterable[Choice], calibration: list[Batch], batches: list[Batch], told: Told
    ) -> dict[Choice, float]:
        """
        As `losses`, but each bridge is fitted on the states of the hybrid itself with all earlier bridges in place, as
        `calibrate(order="sequential")` does. Depth first with the whole text at every depth: memory holds the states
        of both texts once per depth, and the components' own states at every entry. `told` is called after every
        choice.
        """
        tree, read = tree_of(choices), [*calibration, *batches]
        found: dict[Choice, float] = {}
        tokens, total = token_count(calibration), sum(target_count(batch) for batch in batches)
        targets = self._own_states(calibration)

        def enter(pair, states):
            if not self.needs_bridge(pair):
                return states
            bridge, own = self.fresh_bridge(pair), targets[pair[1]]
            index = {id(batch): i for i, batch in enumerate(calibration)}
            problem = Problem(
                bridge_name(pair), bridge, lambda given: (states[index[id(given[0])]], own[index[id(given[0])]])
            )
            _fit([problem], calibration, tokens, progress=False)
            return [self.cross(pair, state, bridge) for state in states]

        def descend(depth, branch, before, states):
            if depth == self.blocks:
                pair = self.ends(self.last(before), None)
                entered = enter(pair, states)[len(calibration) :]
                losses = [self.loss(batch, pair[1].component, x) for batch, x in zip(batches, entered)]
                found[before] = sum(losses) / total
                told(found)
                return
            for p, below in branch.items():
                if (depth, p) not in self._entries:
                    descend(depth + 1, below, (*before, p), states)
                    continue
                pair = self.ends(self.last(before), (depth, p))
                given = [self.start(batch, p) for batch in read] if depth == 0 else states
                entered = enter(pair, given)
                left = [self.slice(batch, depth, p, state) for batch, state in zip(read, entered)]
                descend(depth + 1, below, (*before, p), left)

        descend(0, tree, (), None)
        return found

    def _own_states(self, batches: list[Batch]) -> dict[End, list[torch.Tensor]]:
        """The components' own states at every end that a bridge leads to, one tensor a batch."""
        ends = {pair[1] for pair in self.pairs() if self.needs_bridge(pair)}
        found: dict[End, list[torch.Tensor]] = {end: [] for end in ends}
        for k in {end.component for end in ends}:
            positions = {end.position for end in ends if end.component == k}
            for batch in batches:
                states = self.states.run(k, batch, positions)
                for end in ends:
                    if end.component == k:
                        found[end].append(states[end.position])
        return found


def tree_of(choices: Iterable[Choice]) -> dict:
    """Nested dictionaries, path index -> what may follow; choices with a common beginning share it."""
    tree: dict = {}
    for choice in choices:
        branch = tree
        for p in choice:
            branch = branch.setdefault(p, {})
    return tree


def bridge_name(pair: tuple[End, End]) -> str:
    """`component@layer -> component@layer`; a plus sign: after the final norm."""
    words = [f"{end.component}@{end.position[0]}{'+' if end.position[1] else ''}" for end in pair]
    return " -> ".join(words)


def labels_of(batch: Batch) -> torch.LongTensor:
    """Labels (batch, tokens), -100 for padding."""
    if batch.attention_mask is None:
        return batch.input_ids
    return batch.input_ids.masked_fill(batch.attention_mask == 0, -100)


def summed_loss(logits: torch.Tensor, batch: Batch) -> tuple[float, int]:
    """Summed next-token cross-entropy in nats of logits (batch, tokens, vocabulary), and the number of targets."""
    targets = labels_of(batch)[:, 1:].flatten()
    loss = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, ignore_index=-100, reduction="sum")
    return loss.item(), int((targets != -100).sum())


def target_count(batch: Batch) -> int:
    """Tokens of a batch that are predicted."""
    return int((labels_of(batch)[:, 1:] != -100).sum())


def token_count(batches: list[Batch]) -> int:
    """Unmasked tokens of all batches."""
    return sum(int((labels_of(batch) != -100).sum()) for batch in batches)


@torch.inference_mode()
def held_out_loss(model: PreTrainedModel, batches: list[Batch]) -> float:
    """Mean next-token loss in nats of a model, in evaluation mode; the mode is restored."""
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        loss, count = summed_loss(logits, batch)
        total, tokens = total + loss, tokens + count
    model.train(was_training)
    return total / tokens
