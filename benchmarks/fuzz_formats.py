"""Opens broken dictionaries of every dialect, by the million: each must be refused by name, or be whole.

    python benchmarks/fuzz_formats.py [--first 0] [--cases 100000] [--minutes 30] [--folder DIR]
    python benchmarks/fuzz_formats.py --first 4711 --cases 1 --keep DIR    # one case again, with its folder

A case is a number: it chooses a valid folder, what is broken in it, and how it is opened. `first` and the
number of cases done give the numbers to go on with. The cases run in a process whose memory and whose CPU
time for a case are limited. A finding is anything but a UserError or a whole dictionary: another exception,
an allocation that failed, a case that takes over 10 s, a dead process, an unpickled object, a write or a
connection outside the folder. The last line is JSON.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import sae
from benchmarks import fuzz_mutations
from benchmarks.fuzz_bytes import HARM
from benchmarks.fuzz_mutations import Files
from sae import dialects
from sae.dialects.parts import Parts, make_parts
from sae.dictionary import DictionaryConfig, parameter_shapes
from sae.errors import UserError

_SECONDS, _PATIENCE, _ROOM = 10, 120, 2**30
"""CPU seconds a case may take; seconds without an answer; bytes that the process may grow by."""
_SITE = "blocks.5.hook_resid_post"
_PAIR = ("blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = {
    *("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork"),
    *("socket.connect", "ctypes.dlopen", "os.putenv", "shutil.rmtree"),
}
_CHANGES = {
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.symlink",
    "os.link",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
}


def valid_folders() -> list[Files]:
    """A whole folder of every dialect, architecture and layout that can be written."""
    found: list[Files] = []
    with tempfile.TemporaryDirectory() as temporary:
        for architecture in ("jumprelu", "batchtopk", "topk", "relu", "gated"):
            for transcoder in (False, True):
                made = _parts(architecture, transcoder)
                for dialect in dialects.DIALECTS:
                    folder = Path(temporary) / f"{architecture}{transcoder}{dialect}" / "layers.5"
                    try:
                        dialects.write(made, folder, dialect)
                    except UserError:
                        continue
                    found.append(_files(folder))
                own = Path(temporary) / f"{architecture}{transcoder}"
                sae.save(sae.build(sae.DictionaryConfig(**made.cfg), made.tensors), own)
                found.append(_files(own))
    return found + _older(found)


def _older(folders: list[Files]) -> list[Files]:
    """Layouts that others write and we only read: scales and biases to fold, the flat config, AutoEncoder."""
    found: list[Files] = []
    for files in folders:
        if "sae_weights.safetensors" in files:
            values = json.loads(files["cfg.json"])
            values["metadata"].pop("jumpscope", None)
            scaled = {"normalize_activations": "expected_average_only_in", "norm_scaling_factor": 2.0}
            values |= scaled | {"apply_b_dec_to_input": True}
            found.append(files | {"cfg.json": json.dumps(values).encode()})
            flat = {
                "hook_point": _SITE,
                "context_size": 64,
                "normalize_activations": False,
                "d_in": 6,
                "d_sae": 20,
            }
            found.append(files | {"cfg.json": json.dumps(flat).encode()})
        elif "ae.pt" in files:
            arrays = torch.load(io.BytesIO(files["ae.pt"]), weights_only=True)
            if "decoder.bias" in arrays:
                arrays["bias"] = arrays.pop("decoder.bias")
                buffer = io.BytesIO()
                torch.save(arrays, buffer)
                config = files["config.json"].replace(b"AutoEncoderNew", b"AutoEncoder")
                found.append({"ae.pt": buffer.getvalue(), "config.json": config})
    return found


def _files(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".md"}


def _parts(architecture: str, transcoder: bool) -> Parts:
    made = torch.Generator().manual_seed(len(architecture) + transcoder)
    k = 4 if "topk" in architecture else 0
    cfg = DictionaryConfig(architecture=architecture, d_in=6, d_sae=20, skip=transcoder, k=k)
    tensors = {name: torch.randn(shape, generator=made) for name, shape in parameter_shapes(cfg).items()}
    if "threshold" in tensors:
        tensors["threshold"] = torch.full((20,), 0.3)
    sites = _PAIR if transcoder else (_SITE, _SITE)
    fields = {"k": k, "model": "google/gemma-3-270m", "context": 128}
    return make_parts(
        architecture, tensors, source="a", dialect="a", site_in=sites[0], site_out=sites[1], **fields
    )


class Watch:
    """Notes what the process does that opening a file must not do. There is one: hooks are for good."""

    def __init__(self) -> None:
        self.inside, self.seen = "", set[str]()
        sys.addaudithook(self._saw)

    def _saw(self, event: str, values: tuple[Any, ...]) -> None:
        if not self.inside:
            return
        if event in _FORBIDDEN:
            self.seen.add(f"{event} {values!r:.120}")
        elif event in _CHANGES or (event == "open" and isinstance(values[2], int) and values[2] & _WRITES):
            path = values[0]
            if isinstance(path, str | bytes) and not os.path.realpath(os.fsdecode(path)).startswith(
                self.inside
            ):
                self.seen.add(f"{event} {os.fsdecode(path):.120}")


def run_case(number: int, folder: Path, valid: list[Files], watch: Watch) -> str:
    """Makes a case in an empty folder and opens it; returns `opened`, `refused`, or what was found wrong."""
    rng = random.Random(number)
    files, done = fuzz_mutations.mutate(rng.choice(valid), rng, valid)
    inner = folder / "layers.5"
    for name, data in files.items():
        (inner / name).parent.mkdir(parents=True, exist_ok=True)
        (inner / name).write_bytes(data)
    path, moved = fuzz_mutations.misplace(inner, rng)
    watch.seen.clear()
    watch.inside = os.path.realpath(folder)
    try:
        answer = _open(path, rng, folder)
    except Exception as error:
        answer = _signature(error)
    finally:
        watch.inside = ""
    if (folder / HARM).exists() or os.path.exists(HARM):
        answer = "a pickle was run"
    if watch.seen:
        answer = f"did {sorted(watch.seen)[0]}"
    return answer if answer in ("opened", "refused") else f"{answer} | {'; '.join([*done, moved])}"


def _open(path: Path, rng: random.Random, folder: Path) -> str:
    """Opens a path as people do: by `sae.load`, or read and written in a format, and opened again."""
    try:
        if rng.random() < 0.4:
            return _check(sae.load(path))
        parts = dialects.read(path)
        _must(set(parts.tensors) == set(parameter_shapes(parts.dictionary.cfg)), "names")
        for name, shape in parameter_shapes(parts.dictionary.cfg).items():
            _must(tuple(parts.tensors[name].shape) == shape, f"shape of {name}")
            _must(bool(torch.isfinite(parts.tensors[name]).all()), f"finite {name}")
        _check(sae.build(sae.DictionaryConfig(**parts.cfg), parts.tensors))
        if rng.random() < 0.5:
            dialects.write(parts, folder / "out", "saelens")
            again = dialects.read(folder / "out")
            _must(again.cfg == parts.cfg, "the same config when written and read again")
            _must(
                all(torch.equal(again.tensors[n], parts.tensors[n]) for n in parts.tensors), "the same bits"
            )
            return "opened"
        dialects.write(parts, folder / "out", rng.choice(list(dialects.DIALECTS)))
    except UserError as error:
        _check_refusal(error)
        return "refused"
    return "opened"


def _check(dictionary: sae.Dictionary) -> str:
    for name, tensor in dictionary.state_dict().items():
        _must(bool(torch.isfinite(tensor).all()), f"finite {name}")
    rows = torch.zeros(2, dictionary.cfg.d_in, dtype=dictionary.W_enc.dtype)
    _must(dictionary(rows).shape == (2, dictionary.cfg.d_out), "shape of the output")
    return "opened"


def _check_refusal(error: BaseException) -> None:
    _must(len(str(error)) < 20_000, "a message of sane length")
    str(error).encode()  # a terminal must be able to show it
    cause: BaseException | None = error
    while cause is not None:
        is_memory = isinstance(cause, MemoryError) or "can't allocate" in str(cause)[:2000]
        _must(not is_memory, "no allocation of what a file only claims")
        cause = cause.__cause__ or cause.__context__


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(f"must hold: {what}")


def _signature(error: BaseException) -> str:
    """What was raised, and the last of our own lines that it passed."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/sae/" in f.filename] or [
        *traceback.extract_tb(error.__traceback__)
    ]
    frame = frames[-1]
    said = re.sub(r"[^ ']*/", "", str(error))[:100]  # without the folder, which has a new name every time
    return f"{type(error).__name__}: {said!r} at {Path(frame.filename).name}:{frame.lineno}"


def _work(first: int, last: int, folder: str, answers: Connection) -> None:
    """Runs cases in a process of its own, and says before each which it is."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.chdir(folder)
    valid, watch = valid_folders(), Watch()
    used = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**26, resource.RLIM_INFINITY))
    for number in range(first, last):
        answers.send((number, ""))
        spent = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(spent.ru_utime + spent.ru_stime) + _SECONDS + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        case = Path(folder) / "case"
        answers.send((number, run_case(number, case, valid, watch)))
        shutil.rmtree(case, ignore_errors=True)
        shutil.rmtree(HARM, ignore_errors=True)
    answers.send((last, "end"))


def run(first: int, cases: int, seconds: float) -> dict[str, Any]:
    """Runs the cases from `first` on, in a process that is started anew when one kills it."""
    began, at, last = time.monotonic(), first, first + cases
    counts, findings, context = Counter[str](), dict[str, list[Any]](), multiprocessing.get_context("spawn")
    while at < last and time.monotonic() - began < seconds:
        ours, theirs = context.Pipe(duplex=False)
        with tempfile.TemporaryDirectory() as folder:
            worker = context.Process(target=_work, args=(at, last, folder, theirs))
            worker.start()
            theirs.close()
            answer = "started"
            try:
                while answer != "end" and time.monotonic() - began < seconds:
                    # by turns and not by the clock: a machine that is put to sleep is no hang
                    if not any(ours.poll(1) for _ in range(_PATIENCE)):
                        raise EOFError
                    at, answer = ours.recv()
                    if answer in ("opened", "refused"):
                        counts[answer] += 1
                    elif answer not in ("", "end"):
                        _note(findings, at, answer)
                    at += answer not in ("", "end")
            except EOFError:
                worker.join(1)
                _note(findings, at, f"killed or hung, exit code {worker.exitcode}")
                at += 1
            worker.kill()
            worker.join()
    return {
        "benchmark": "fuzz_formats",
        "seeds": [first, at],
        **counts,
        "findings": {name: {"count": row[0], "first": row[1:]} for name, row in findings.items()},
        "wall_s": round(time.monotonic() - began, 1),
    }


def _note(findings: dict[str, list[Any]], number: int, answer: str) -> None:
    signature, _, done = answer.partition(" | ")
    row = findings.setdefault(signature, [0, number, done])
    row[0] += 1
    if row[0] == 1:
        print(f"case {number}: {answer}", flush=True)


def main() -> None:
    """Prints each kind of finding once, and the numbers as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument(
        "--keep", type=Path, help="run the first case alone in this folder, and leave it there"
    )
    arguments = parser.parse_args()
    if arguments.keep:
        arguments.keep.mkdir(parents=True)
        print(run_case(arguments.first, arguments.keep, valid_folders(), Watch()))
        return
    print(json.dumps(run(arguments.first, arguments.cases, 60 * arguments.minutes)))


if __name__ == "__main__":
    main()
