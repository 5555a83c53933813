"""What XSAM remembers between updates, and what one update saw."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from .geometry import local
from .search import AlphaSearch


@dataclass
class XSAMState:
    """
    What XSAM remembers between updates of one model: plain numbers, and for some methods tensors. Keep both with your checkpoint.

    Args:
        alpha (`float`): position on the arc that the last search found; starts at 1, SAM's direction.
        search_due (`bool`): search α in the next update; set it at the beginning of every epoch.
        updates (`int`): the number of updates so far.
        search_gain (`float`, *optional*): L(θ_0 + ρ_max v(α*)) − L(θ_0 + ρ_max v(1)) of the last search.
        alpha_at_edge (`bool`, *optional*): whether the last search ended at an end of its grid.
        search_noise (`float`, *optional*): noise of the last search's curve as a share of its range; above 1, α was kept.
        average_of (`str`, *optional*): the perturbation that made the average.
        average (`dict[str, torch.Tensor]`):
            The running average of `vasso`, `fsam` and `stale`, by the weights' names. Empty for all others.
        memory (`list[torch.Tensor]`): room for the copy of weights on a CPU; no state, and not for a checkpoint.

    Raises:
        `ValueError`: a number is not finite, or of another kind.
    """

    alpha: float = 1.0
    search_due: bool = True
    updates: int = 0
    search_gain: float | None = None
    alpha_at_edge: bool | None = None
    search_noise: float | None = None
    average_of: str | None = None
    average: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    memory: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self):
        self._averaged: WeakSet[nn.Module] | None = None  # the modules whose gradients the average is of
        self._looked_at = False
        whole = _is_number(self.updates) and self.updates >= 0 and self.updates == int(self.updates)
        fit = {
            "alpha": _is_number(self.alpha) and self.alpha >= 0,
            "search_due": isinstance(self.search_due, bool),
            "updates": whole,
            "search_gain": self.search_gain is None or _is_number(self.search_gain),
            "alpha_at_edge": isinstance(self.alpha_at_edge, bool | None),
            "search_noise": self.search_noise is None or _is_number(self.search_noise),
            "average_of": isinstance(self.average_of, str | None),
        }
        for name, fits in fit.items():
            if not fits:
                raise ValueError(f"XSAM's `{name}` is {getattr(self, name)!r}, which no update leaves")

    def __getstate__(self) -> dict[str, Any]:
        # A copy may be for a copy of the model, and a loaded state for one that is built anew.
        return {**self.__dict__, "_averaged": None, "_looked_at": False}

    def check_average(self, perturbation: str, weights: Mapping[str, Tensor], model: nn.Module | None) -> None:
        """
        Refuses a running average that another perturbation made, or that is none of these weights'.

        Whether its numbers are finite is looked at once, before its first use: this waits for the device, if there is an average by
        then, as in a state that was loaded.

        Args:
            perturbation (`str`): of this update.
            weights (`Mapping[str, torch.Tensor]`): the perturbed ones, by name.
            model (`torch.nn.Module`, *optional*): that they are of, if it is known.

        Raises:
            `ValueError`: so it is.
        """
        if not isinstance(self.average, dict) or not all([isinstance(part, Tensor) for part in self.average.values()]):
            raise ValueError(
                f"The state's `average` is {reprlib.repr(self.average)}: give a dictionary of the weights' names and tensors, as "
                "`XSAMState.average` is, or begin with a new XSAMState()."
            )
        if self.average and self.average_of is None:
            raise ValueError(
                "The state has a running average, and `average_of`, which perturbation made it, is None: keep both with your checkpoint."
            )
        if self.average and self.average_of != perturbation:
            raise ValueError(
                f"`perturbation` is {perturbation!r}, and the state's running average was made by {self.average_of!r}, to which it means "
                f"something else: go on with {self.average_of!r}, or begin anew."
            )
        self.average_of = perturbation
        for name, weight in weights.items():
            part = self.average.get(name)
            if part is None:
                continue
            if part.shape != weight.shape:
                raise ValueError(
                    f"The state's average of {name!r} has the shape {tuple(part.shape)}, and the weight {tuple(weight.shape)}: it "
                    "belongs to another model. Begin with a new XSAMState()."
                )
            if part.is_complex() != weight.is_complex() or not (part.is_complex() or part.is_floating_point()):
                raise ValueError(
                    f"The state's average of {name!r} has {part.dtype}, and the weight {weight.dtype}: load another checkpoint, or begin "
                    "with a new XSAMState()."
                )
        if not self._looked_at:
            self._looked_at = True
            for name, part in self.average.items():
                if not local([part])[0].isfinite().all():
                    raise ValueError(
                        f"The state's average of {name!r} has numbers that are not finite: load another checkpoint, or begin with a new "
                        "XSAMState()."
                    )
        if model is None:
            return
        if unknown := self.average.keys() - weights.keys():  # of weights that do not move now, or of none
            unknown -= {name for name, _ in model.named_parameters(remove_duplicate=False)}
            if unknown:
                raise ValueError(
                    f"The state's running average has {min(unknown)!r}, and no weight of the model is called so. What wraps a model (DDP, "
                    "torch.compile, PEFT) gives its weights other names: give the model in the form in which the average was made, or "
                    "begin with a new XSAMState()."
                )
        if not self.average or self._averaged is None:
            self._averaged = WeakSet(model.modules())
        # What wraps a model or changes it in place (DDP, FSDP, PEFT, `model.to`) keeps some of its modules.
        elif not any(module in self._averaged for module in model.modules()):
            raise ValueError(
                "The state's running average was made with another model, none of whose modules is in this one: begin with a new "
                "XSAMState(), or with copy.copy(state) if this model goes on from that one."
            )

    def remember(self, search: AlphaSearch, again: bool = False) -> None:
        """
        Takes over the result of a search. One without a finite loss, or of noise alone, keeps α; `again` leaves the search to the next
        update, for this one had nothing to search along.
        """
        self.search_due = again
        self.search_noise = search.noise
        if search.alpha is not None:
            self.alpha, self.search_gain, self.alpha_at_edge = search.alpha, search.gain, search.at_edge


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass
class XSAMUpdate:
    """
    What one update saw. Numbers are 0-dim tensors on the weights' device, so that reading them is the caller's choice.

    Args:
        loss (`torch.Tensor`): L(θ_0), the loss to report; L(θ_0 + ε) of `stale`, which knows nothing at θ_0 (NaN below).
        last_loss (`torch.Tensor`): L(θ_k); `last_loss - loss` is the sharpness.
        alpha (`float`): α of this update.
        angle (`torch.Tensor`): ψ between v_0 and v_1, the directions of the displacement and of g_k, in radians.
        grad_norm_first (`torch.Tensor`): ‖g_0‖, the 2-norm over all trainable weights.
        grad_norm_last (`torch.Tensor`): ‖g_k‖.
        fell_back (`torch.Tensor`): whether g_0's direction (`stale`: nothing) had to stand in for a non-finite g_k (boolean).
        search (`AlphaSearch`, *optional*): the search, if there was one.
    """

    loss: Tensor
    last_loss: Tensor
    alpha: float
    angle: Tensor
    grad_norm_first: Tensor
    grad_norm_last: Tensor
    fell_back: Tensor
    search: AlphaSearch | None = None
