"""The search for a setting, the same for every contender, that does not stop at an edge."""

from collections.abc import Callable, Sequence


def search(loss_at: Callable[[float], float], ladder: Sequence[float], begin: int) -> float:
    """The value in `ladder` with the least loss: three are tried, and one more beyond the best while it is at an edge.

    loss_at: a validation loss; infinity for a run that diverged. Called once for each value that is tried.
    ladder: values in order; begin: index of the first of the three. Of equal losses the earlier value wins.
    Where the loss has one valley, that is the best of the whole ladder. Raises ValueError if there are no three.
    """
    if not 0 <= begin <= len(ladder) - 3:
        raise ValueError(f"begin={begin} leaves no three of the ladder's {len(ladder)} values: choose another")
    losses = {place: loss_at(ladder[place]) for place in range(begin, begin + 3)}
    while True:
        best = min(sorted(losses), key=losses.get)
        beyond = best - 1 if best == min(losses) else best + 1
        if beyond in losses or not 0 <= beyond < len(ladder):
            return ladder[best]
        losses[beyond] = loss_at(ladder[beyond])
