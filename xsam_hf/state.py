"""What XSAM remembers between updates, and what one update saw."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .search import AlphaSearch


@dataclass
class XSAMState:
    """
    What XSAM remembers between updates: plain numbers, and for some methods tensors. Keep both with your checkpoint.

    Args:
        alpha (`float`): position on the arc that the last search found; starts at 1, SAM's direction.
        search_due (`bool`): search α in the next update; set it at the beginning of every epoch.
        updates (`int`): the number of updates so far.
        search_gain (`float`, *optional*): L(θ_0 + ρ_max v(α*)) − L(θ_0 + ρ_max v(1)) of the last search.
        alpha_at_edge (`bool`, *optional*): whether the last search ended at an end of its grid.
        search_noise (`float`, *optional*): noise of the last search's curve as a share of its range; above 1, α was kept.
        average (`dict[str, torch.Tensor]`):
            The running average of `vasso`, `fsam` and `stale`, by the weights' names. Empty for all others.
        memory (`list[torch.Tensor]`): room for the copy of weights on a CPU; no state, and not for a checkpoint.
    """

    alpha: float = 1.0
    search_due: bool = True
    updates: int = 0
    search_gain: float | None = None
    alpha_at_edge: bool | None = None
    search_noise: float | None = None
    average: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    memory: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    def remember(self, search: AlphaSearch) -> None:
        """Takes over the result of a search. One without a finite loss, or of noise alone, keeps α."""
        self.search_due = False
        self.search_noise = search.noise
        if search.alpha is not None:
            self.alpha, self.search_gain, self.alpha_at_edge = search.alpha, search.gain, search.at_edge


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
