"""What is made when it is first wanted and then kept, where many threads want it: the viewer's sessions."""

import threading
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class once(Generic[T]):  # used as a decorator, like property
    """A property that is computed once an object, by one thread while all others that ask for it wait.

    functools.cached_property computes it in every thread that comes early (from Python 3.12 on), or lets
    all objects of the class wait for one (before).
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name, self._lock = name, f"{name}: lock"

    @overload
    def __get__(self, instance: None, owner: type) -> "once[T]": ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> "once[T] | T":
        if instance is None:
            return self
        # from now on the value stands in the object itself, where Python finds it before it comes here
        values = instance.__dict__
        with values.setdefault(self._lock, threading.RLock()):
            if self._name not in values:
                values[self._name] = self._compute(instance)
            # whoever still waits for this lock finds the value
            values.pop(self._lock, None)
            return values[self._name]


class Kept(Generic[T]):
    """Values by name, each made by one thread while the others that want the same one wait.

    A value is made anew when its stamp is another one; take the stamp before what it stands for is read.
    """

    def __init__(self) -> None:
        self._locks: dict[Hashable, threading.RLock] = {}
        self._values: dict[Hashable, tuple[Any, T]] = {}

    def get(self, name: Hashable, stamp: Any, make: Callable[[], T]) -> T:
        """The value of a name, kept from an earlier call of the same stamp or made now."""
        with self._locks.setdefault(name, threading.RLock()):
            kept = self._values.get(name)
            if kept is None or kept[0] != stamp:
                kept = self._values[name] = (stamp, make())
            return kept[1]
