"""What a chapter shows beside its own outputs: Markdown, a line to be filled in later, and values for glue."""

import sys
from typing import Any

_GLUE = "application/papermill.record/"  # the prefix under which MyST-NB and papermill keep hidden values


def in_ipython() -> bool:
    """Whether the code runs in a notebook or an IPython shell."""
    ipython = sys.modules.get("IPython")  # whoever runs inside IPython has imported it
    return ipython is not None and ipython.get_ipython() is not None


def show(markdown: str) -> None:
    """Displays Markdown in a notebook, prints it elsewhere."""
    if not in_ipython():
        print(markdown)
        return
    from IPython.display import Markdown, display

    display(Markdown(markdown))


def reserve(markdown: str) -> Any:
    """Displays a line that `fill` can replace; returns its handle, None outside a notebook."""
    if not in_ipython():
        return None
    from IPython.display import Markdown, display

    return display(Markdown(markdown), display_id=True)


def fill(handle: Any, markdown: str) -> None:
    """Replaces a reserved line, wherever in the notebook it stands."""
    if handle is not None:
        from IPython.display import Markdown

        handle.update(Markdown(markdown))


def glue(key: str, value: float | str) -> None:
    """What `myst_nb.glue` does, without MyST-NB, which a reader's machine need not have."""
    if not in_ipython():
        return
    from IPython.display import display

    metadata = {"scrapbook": {"name": key, "mime_prefix": _GLUE}}
    display({_GLUE + "text/plain": repr(value)}, raw=True, metadata=metadata)
