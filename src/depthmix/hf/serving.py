"""What ``python -m depthmix.hf serve`` changes in the server of transformers: how it answers what cannot be done.

Left alone, the server finds out while it generates: a client is told 500, or reads an error in a stream that began with
200; and as it asks for 1,024 new tokens where the client names no number, it fails every such request to a model with
a small context. Here a request is looked at before anything is computed:

- the server's own number of new tokens is lowered to what the context has room for;
- a prompt, or a number that the client named, for which there is no room is answered with 400 and the model's message,
  in the form in which clients of OpenAI read it;
- so is a chat with a model that has no chat template, as base models have none.

The context is known of depthmix models; other models are served as ever.
"""

import inspect

from fastapi.responses import JSONResponse
from transformers.cli.serving import chat_completion, completion, response

from ..errors import UserError
from ..model import check_room
from .configuration import DepthmixConfig

NUMBERS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "generation_config")
"""Fields in which a client says how much it wants."""


class Unasked(int):
    """A number of new tokens that no client named."""


class Checked:
    """Put in front of a handler of transformers."""

    converses: bool
    """Whether requests are conversations, and no plain text."""

    async def handle_request(self, body, request_id):
        try:
            return await super().handle_request(body, request_id)
        except UserError as error:
            told = {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}
            return JSONResponse({"error": told}, 400)

    def _resolve_model(self, body):
        model_id, model, processor = super()._resolve_model(body)
        if self.converses and getattr(processor, "chat_template", None) is None:
            raise UserError(
                f"{model_id} has no chat template: it continues text and was not made for a conversation; ask "
                f"/v1/completions with a prompt",
            )
        return model_id, model, processor

    def _build_generation_config(self, body, *args, **kwargs):
        try:
            config = super()._build_generation_config(body, *args, **kwargs)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        if config.max_new_tokens is not None and config.max_new_tokens < 1:
            raise UserError(f"at least 1 new token must be asked for, got {config.max_new_tokens}")
        if all(body.get(name) is None for name in NUMBERS):
            config.max_new_tokens = Unasked(config.max_new_tokens)
        return config

    def _streaming(self, *args, **kwargs):
        fit(**_arguments(super()._streaming, args, kwargs))
        return super()._streaming(*args, **kwargs)

    async def _non_streaming(self, *args, **kwargs):
        fit(**_arguments(super()._non_streaming, args, kwargs))
        return await super()._non_streaming(*args, **kwargs)


def _arguments(method, args, kwargs) -> dict:
    given = inspect.signature(method).bind(*args, **kwargs).arguments
    return {name: given[name] for name in ("model", "inputs", "gen_config")}


def fit(model, inputs, gen_config) -> None:
    """Lower a number that no client named to what fits. Raises ``UserError`` where nothing does, or too little."""
    if not isinstance(model.config, DepthmixConfig):
        return
    ids, context = inputs["input_ids"], model.config.seq_len
    prompt, new = len(ids) if isinstance(ids, list) else ids.shape[-1], gen_config.max_new_tokens
    if isinstance(new, Unasked):
        new = gen_config.max_new_tokens = max(1, min(int(new), context + 1 - prompt))
    check_room(prompt, new or 1, context)


def install() -> None:
    """Let the server of transformers, where one is made from now on, check requests."""
    for module, name, converses in (
        (completion, "CompletionHandler", False),
        (chat_completion, "ChatCompletionHandler", True),
        (response, "ResponseHandler", True),
    ):
        handler = getattr(module, name)
        if not issubclass(handler, Checked):
            own = {"converses": converses, "__module__": __name__}
            setattr(module, name, type(name, (Checked, handler), own))
