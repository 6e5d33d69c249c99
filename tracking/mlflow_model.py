"""The model as MLflow stores it: prompts in, texts out. MLflow runs this file to load a model; nothing imports it."""

import sys
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class TextGenerator:
    def load_context(self, context: PythonModelContext) -> None:
        sys.path.insert(0, context.artifacts["code"])  # a zip file

        from nanogpt.saved_model import load_model

        self.gpt = load_model(context.artifacts["model"])

    def predict(  # type: ignore[no-untyped-def]
        self, context: PythonModelContext, model_input, params: dict[str, Any] | None = None
    ) -> list[str]:
        """Returns one text for each prompt; `model_input` is a text, a list of them or a DataFrame's first column.

        params: max_new_tokens, temperature, top_k (0: all), top_p (1: all), seed.
        """
        from nanogpt.complete import complete

        options = dict(params or {})
        if not options.get("top_k"):
            options["top_k"] = None
        if options.get("top_p") == 1:
            options["top_p"] = None
        if hasattr(model_input, "iloc"):
            model_input = model_input.iloc[:, 0].tolist()
        prompts = [model_input] if isinstance(model_input, str) else list(model_input)
        return [complete(self.gpt, str(prompt), **options) for prompt in prompts]


# Two classes, because MLflow requires a type hint for the input of a predict method that its own subclass defines, and
# would then ignore the model's signature and with it the options in `params`.
class Model(TextGenerator, PythonModel):  # type: ignore[misc]
    pass


set_model(Model())
