"""Models of other packages with another residual connection: their own blocks, joined otherwise."""

from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import UserError

if TYPE_CHECKING:
    from ..wrapping import Start

INSTALL = "pip install 'depthmix[hf]'"
"""What to do where models of transformers are asked for, and it is missing."""


def adapt(
    model: Any,
    residual: str = "mgr-competitive",
    *,
    n_streams: int = 4,
    start: "Start" = "own",
    **options: Any,
) -> Any:
    """Give a model of another package another residual connection.

    Args:
        model: a causal language model of transformers, or the configuration of one (a new model is then drawn from
            it, the same as transformers draws); or a module with a list ``blocks`` as the vision transformers of timm
            have. A model is changed in place.
        residual: a name of :func:`depthmix.available_residuals`, with options where wanted.
        n_streams: n, where the connection has streams.
        start: as in :func:`depthmix.wrap`; ``"prenorm"`` continues a pretrained model where it is.
        options: every other option of the connection. For a configuration also ``dtype`` and ``attn_implementation``.

    Returns:
        the model. One of transformers trains, generates, saves and loads as before
        (:mod:`depthmix.adapters.huggingface`).

    Raises:
        ValueError: a connection that cannot be had, or a model whose blocks are something else than
            ``x + F(norm(x))`` for attention and MLP.
    """
    kind = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    if "transformers" in kind:
        from .huggingface import adapt_language_model

        return adapt_language_model(model, residual, n_streams=n_streams, start=start, **options)
    if isinstance(model, nn.Module):
        from .vision import adapt_vision_model

        return adapt_vision_model(model, residual, n_streams=n_streams, start=start, **options)
    raise UserError(
        f"adapt takes a model or configuration of transformers, or a module with blocks; got a {type(model).__name__}. "
        f"For a list of modules there is depthmix.wrap"
    )
