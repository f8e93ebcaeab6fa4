"""The choice of victims: what leaves the device, or host memory, to make room.

Like the planner, these functions are pure: they read no clock and write no log.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from engine.scheduling.plan import Park, Unload
from engine.scheduling.planned_model import PlannedModel
from engine.scheduling.snapshot import ModelView
from engine.status import ModelState


@dataclass(frozen=True, slots=True, eq=False)
class Victim:
    """A model, and what is to leave of it."""

    model: PlannedModel
    blocks: frozenset[str] | None
    """The blocks to park; None: all of the model leaves, by an unload."""
    nbytes: int

    def leave(self, reason: str) -> Unload | Park:
        """The transition that frees the bytes."""
        if self.blocks is None:
            return Unload(self.model.view.id, reason)
        return Park(self.model.view.id, self.blocks, reason)


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Bytes that can leave the device together."""

    model: PlannedModel
    block: str | None
    """None: the bytes that only an unload of the model frees."""
    nbytes: int
    cost: float
    """Expected seconds of bringing it back, per second of absence."""


def least_costly(
    candidates: Iterable[PlannedModel], deficit_bytes: int, draining: Collection[str]
) -> list[Victim] | None:
    """The victims, in the order in which they leave; None if all candidates do not suffice.

    Takes the pieces of lowest cost per byte first (a KV cache costs nothing to bring back).
    Then leaves out, dearest first, each pick that a later and larger pick made superfluous.
    """
    if deficit_bytes <= 0:
        return []
    picks: list[_Piece] = []
    surplus_bytes = -deficit_bytes
    pieces = [piece for model in candidates for piece in _pieces(model) if piece.nbytes > 0]
    for piece in sorted(
        pieces,
        key=lambda piece: (
            piece.model.view.id not in draining,
            piece.model.leases > 0,
            piece.cost / piece.nbytes,
            piece.model.view.idle_since or 0.0,
        ),
    ):
        if surplus_bytes >= 0:
            break
        picks.append(piece)
        surplus_bytes += piece.nbytes
    if surplus_bytes < 0:
        return None
    for piece in sorted(
        picks,
        key=lambda piece: (
            piece.model.view.id not in draining,
            piece.model.leases > 0,
            piece.cost,
            piece.nbytes,
        ),
        reverse=True,
    ):
        if piece.nbytes <= surplus_bytes:
            picks.remove(piece)
            surplus_bytes -= piece.nbytes
    return _by_model(picks)


def whole(model: PlannedModel) -> Victim:
    """All that the model has on the device."""
    return Victim(model, _names(_pieces(model)), model.view.resident_bytes)


def first_idle(victims: Iterable[Victim], reason: str) -> Unload | Park | None:
    """The transition of the first victim without leases; None if all are in use."""
    for victim in victims:
        if victim.model.leases == 0:
            return victim.leave(reason)
    return None


def host_victims(
    claimant: PlannedModel, candidates: Iterable[PlannedModel], lacking_bytes: int
) -> list[PlannedModel]:
    """Parked models whose host copies make room for the claimant's, the least worth first.

    None at all if all of them do not suffice, or if theirs together save more than the
    claimant's would.
    """
    chosen: list[PlannedModel] = []
    for model in sorted(
        (
            model
            for model in candidates
            if model is not claimant
            and model.view.state is ModelState.PARKED
            and model.view.host_bytes > 0
            and not model.view.pinned
        ),
        key=lambda model: _saved(model.view) / model.view.host_bytes,
    ):
        if lacking_bytes <= 0:
            break
        chosen.append(model)
        lacking_bytes -= model.view.host_bytes
    worth = claimant.view.reload_s * claimant.view.demand
    if lacking_bytes > 0 or sum(_saved(model.view) for model in chosen) > worth:
        return []
    return chosen


def _pieces(model: PlannedModel) -> list[_Piece]:
    """The pieces of a model that can leave separately."""
    view = model.view
    pieces = [
        _Piece(model, part.name, part.nbytes, part.wake_s * view.demand) for part in view.parts
    ]
    rest_bytes = view.resident_bytes - sum(piece.nbytes for piece in pieces)
    if rest_bytes > 0:
        pieces.append(_Piece(model, None, rest_bytes, view.reload_s * view.demand))
    return pieces


def _by_model(pieces: Iterable[_Piece]) -> list[Victim]:
    grouped: dict[PlannedModel, list[_Piece]] = {}
    for piece in pieces:
        grouped.setdefault(piece.model, []).append(piece)
    return [
        Victim(
            model,
            _names(each),
            model.view.resident_bytes if _names(each) is None else sum(p.nbytes for p in each),
        )
        for model, each in grouped.items()
    ]


def _names(pieces: list[_Piece]) -> frozenset[str] | None:
    """The blocks to park; None where parking cannot free all of the bytes."""
    names = frozenset(piece.block for piece in pieces if piece.block is not None)
    return names if len(names) == len(pieces) else None


def _saved(view: ModelView) -> float:
    """Seconds that the host copy of a model is expected to save, per second."""
    return max(0.0, view.reload_s - view.wake_s) * view.demand
