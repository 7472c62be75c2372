"""A model in this process, behind the same door as a server: requests that wait together are answered as one batch."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from apo_trl.pairs.config.settings import Role

__all__ = ["Local"]

_GATHER = 0.02  # seconds in which other rows may join a batch


class Local:
    """One model, loaded when it is first asked, in a thread of its own."""

    def __init__(self, role: Role, *, scores: bool) -> None:
        self._role, self._scores = role, scores
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=role.name)
        self._waiting: list[tuple[dict[str, Any], asyncio.Future[Any]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._model: Any = None

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def answer(self, body: dict[str, Any]) -> Any:
        """Answer one request; the body of a response, or one with `error` for a request that cannot be answered."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((body, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            await asyncio.sleep(_GATHER)
            batch, self._waiting = self._waiting[: self._role.batch_size], self._waiting[self._role.batch_size :]
            try:
                bodies = await loop.run_in_executor(self._thread, self._answer, [body for body, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), body in zip(batch, bodies, strict=True):
                if not future.done():
                    future.set_result(body)

    def _answer(self, bodies: list[dict[str, Any]]) -> list[Any]:
        from apo_trl.models.packaged import resolve_model
        from apo_trl.pairs.llm import in_process

        role = self._role
        if self._model is None:
            make = in_process.RewardModel if self._scores else in_process.Generator
            self._model = make(
                resolve_model(str(role.model)), dtype=role.dtype, device=role.device, batch_size=role.batch_size
            )
        if self._scores:
            return [_scored(score) for score in self._model.score([body["messages"] for body in bodies])]
        answers: list[Any] = self._model.answer(bodies)
        return answers


def _scored(score: float | None) -> dict[str, Any]:
    if score is None:
        return {"error": {"message": "the conversation is longer than the reward model's context"}}
    # As a verdict is written by a judge, so that whoever reads scores need not ask who gave them.
    return {"choices": [{"index": 0, "message": {"content": f"[[{score!r}]]"}, "finish_reason": "stop"}], "usage": {}}
