"""In the program's process: wait for POT or GeomLoss to be imported, then swap.

Loaded by path, from the ``sitecustomize`` that `sbot.migrate.run` puts on the program's path, before anything else is; so it
imports nothing but the standard library until there is something to swap.  Whatever goes wrong here is recorded, and the
program goes on.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

VARIABLE = "SBOT_MIGRATE"
#: Modules after whose import something is swapped, and a name by which they are known; a submodule may come long after.
WATCHED = {"ot": "bregman", "geomloss": "SamplesLoss", "geomloss.ot": "solve"}


class Recorder:
    """Events of this process, one JSON object a line, in a file of its own; a forked child has another."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._new()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def _new(self) -> None:
        self._path = os.path.join(self.folder, f"{os.getpid()}-{os.urandom(4).hex()}.jsonl")

    def _forked(self) -> None:
        self._lock = threading.Lock()
        self._new()
        self.note("process", pid=os.getpid(), command=sys.orig_argv, forked=True)

    def note(self, event: str, **facts: Any) -> None:
        """Write an event, at once: a process may end without notice."""
        line = json.dumps({"event": event, **facts}) + "\n"
        try:
            with self._lock, open(self._path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError:  # the folder is gone: the check has ended before this process
            pass


class Watch(importlib.abc.MetaPathFinder):
    """Calls ``swap(name)`` when a watched module has been imported, before its importer sees it."""

    def __init__(self, recorder: Recorder, swap: Callable[[str], Any]) -> None:
        self.recorder, self.swap = recorder, swap
        self.waiting = set(WATCHED)

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name not in self.waiting:
            return None
        self.waiting.discard(name)  # so that the search goes on to those who find it
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            self.waiting.add(name)
            self.recorder.note("missing", name=name, python=sys.executable)
            return spec
        load = spec.loader.exec_module
        loader: Any = spec.loader

        def exec_module(module: ModuleType) -> None:
            if module.__name__ != name:  # of a loader that several modules share
                return load(module)
            del loader.exec_module
            try:
                load(module)
            except BaseException:
                self.waiting.add(name)  # it may be tried again
                raise
            self._swap(name, module)

        try:
            loader.exec_module = exec_module
        except AttributeError:
            self.recorder.note("trouble", what=f"{name} was left as it is: its loader, {loader!r}, cannot be followed")
        return spec

    def _swap(self, name: str, module: ModuleType) -> None:
        if not hasattr(module, WATCHED[name]):
            self.recorder.note("trouble", what=f"the program's {name!r} is not that of the library: {module.__file__}")
            return
        try:
            self.swap(name)
        except Exception as fault:
            self.recorder.note("trouble", what=f"{name} was left as it is: {type(fault).__name__}: {fault}")


def install() -> None:
    """Start to watch, as the environment says."""
    settings = json.loads(os.environ[VARIABLE])
    recorder = Recorder(settings["folder"])
    recorder.note("process", pid=os.getpid(), command=sys.orig_argv)

    made: list[Any] = []

    def swap(name: str) -> None:
        _load_sbot(settings["package"])
        if not made:
            made.append(importlib.import_module("sbot.migrate.both").Both(recorder.note, settings["returned"]))
        made[0].swap(name)

    sys.meta_path.insert(0, Watch(recorder, swap))


def _load_sbot(folder: str) -> None:
    """The sbot that runs the check, whatever the program's path is; what it needs is the program's own."""
    if "sbot" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "sbot", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sbot"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["sbot"]
        raise
