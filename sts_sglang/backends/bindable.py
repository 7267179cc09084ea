"""What the backends have in common: SGLang builds them before draft and target know each other."""

from __future__ import annotations

from sts_sglang.core.runtime import Runtime


class Bindable:
    """A backend that serves once it was bound."""

    _runtime: Runtime | None = None

    def bind(self, runtime: Runtime) -> None:
        """Give the backend the pair that it serves."""
        self._runtime = runtime

    @property
    def runtime(self) -> Runtime:
        """Raises RuntimeError before `bind`: attention without it would be dense, or of nothing."""
        if self._runtime is None:
            raise RuntimeError(f"STS: {type(self).__name__} runs before draft and target were bound")
        return self._runtime
