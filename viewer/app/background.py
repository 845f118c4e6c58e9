"""The language models of the runs shown: loaded behind the pages, used by one session at a time."""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import psutil

from sae.errors import UserError
from viewer.runs import Run

log = logging.getLogger("jumpscope")

State = Literal["loading", "ready", "absent"]
_KEPT = 12
"""Answers kept for a run: the same question is asked by every rerun of a page, and by shared links."""
_LOOK = 0.2
"""Seconds after which a caller that waits is asked whether it still wants to."""


class Turns:
    """A lock whose callers go in the order they came. One model's hooks allow one call at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()

    @contextmanager
    def taken(self, waiting: Callable[[int], None] | None = None) -> Iterator[None]:
        """Within it no other caller is. `waiting` is told a few times a second how many are ahead.

        It may raise, which gives the place in the queue up; so does whatever fails within.
        """
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
        try:
            while (ahead := self._ahead(ticket)) > 0:
                if waiting is not None:
                    waiting(ahead)
            yield
        finally:
            with self._changed:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def _ahead(self, ticket: object) -> int:
        """How many are ahead, after a short wait for them."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue[0] is ticket, timeout=_LOOK)
            return self._queue.index(ticket)


class _Model:
    """A language model, shared by the runs that were trained on it."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.loading = threading.Lock()
        self.loaded: Any = None


class Resident:
    """A run's language model and dictionaries: where their loading stands, and calls on them."""

    def __init__(self, run: Run, model: _Model) -> None:
        self.run = run
        self.state: State = "absent"
        self.doing = ""
        """What is being loaded."""
        self.why = ""
        """Why there is no model, where it is absent."""
        self.on_request = False
        """Whether it is absent only because nobody asked for what it takes."""
        self._model = model
        self._since = 0.0
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._keeping = threading.Lock()

    @property
    def seconds(self) -> float:
        """How long the loading has taken so far."""
        return time.monotonic() - self._since

    def load(self, *, asked: bool = False) -> None:
        """Starts to load in a thread of its own. `asked` allows a download, and to fill the memory."""
        self.state, self._since = "loading", time.monotonic()
        self.doing = "the language model"
        # a daemon, so that the server can be stopped meanwhile
        threading.Thread(target=self._load, args=(asked,), name="jumpscope-model", daemon=True).start()

    def call(
        self, key: Hashable, compute: Callable[[], Any], waiting: Callable[[int], None] | None = None
    ) -> Any:
        """The answer of `compute`, a call on the run; a key asked for lately is not computed again.

        Calls of all sessions go one after the other; `waiting` is told how many are ahead.
        """
        answer = self.kept(key)
        if answer is None:
            with self._model.turns.taken(waiting):
                # another session may have asked for the same meanwhile
                answer = self.kept(key)
                if answer is None:
                    answer = compute()
                    self._keep(key, answer)
        return answer

    def kept(self, key: Hashable) -> Any:
        """An answer that is still kept, or None."""
        with self._keeping:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _keep(self, key: Hashable, answer: Any) -> None:
        with self._keeping:
            self._kept[key] = answer
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)

    def _load(self, asked: bool) -> None:
        try:
            self.on_request = False
            if not asked and (why := self._obstacle()):
                self.why, self.on_request, self.state = why, True, "absent"
                return
            with self._model.loading:
                if self._model.loaded is None:
                    self._model.loaded = self.run.model
            self.run.use_model(self._model.loaded)
            self.doing = f"the dictionaries of {len(self.run.sites)} sites"
            with self._model.turns.taken():
                # the first trace reads what all others need
                self.run.trace("a")
            self.state = "ready"
        except UserError as error:
            cause = error.__cause__
            self.why, self.state = str(cause if isinstance(cause, UserError) else error), "absent"
        except Exception as error:  # whatever ends the thread must be told, or pages would wait for ever
            log.exception("the language model of %s could not be loaded", self.run.path)
            self.why, self.state = f"{type(error).__name__}: {error}", "absent"

    def _obstacle(self) -> str:
        """What a mere visit must not cause: a download, or a machine without memory. "" for neither."""
        # these import the packages that run models
        from huggingface_hub import try_to_load_from_cache

        from activations.shapes import model_shape
        from activations.sources import head_path, resolve

        name = self.run.model_name
        place = None if head_path(name) else resolve(name)
        if isinstance(place, str) and not isinstance(try_to_load_from_cache(place, "config.json"), str):
            return f"{name} is not on this machine; it would be downloaded."
        shape = model_shape(name)
        need, free = 4 * (shape.body_params + shape.vocab_params), psutil.virtual_memory().available
        if need > 0.8 * free:
            return f"{name} takes {need / 2**30:.1f} GB of memory, and {free / 2**30:.1f} GB are free."
        return ""


_lock = threading.Lock()
_residents: dict[str, Resident] = {}
_models: dict[str, _Model] = {}


def resident(run: Run) -> Resident:
    """A run's live side, for all sessions; the first call starts to load it, and calls never wait."""
    key = str(run.path)
    with _lock:
        found = _residents.get(key)
        # a run that was written anew is opened anew
        if found is None or found.run is not run:
            try:
                name = run.model_name
            except UserError:
                # its own loading will tell why
                name = key
            found = _residents[key] = Resident(run, _models.setdefault(name, _Model()))
            found.load()
        return found
