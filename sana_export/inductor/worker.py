"""A process that packages exported pieces: requests as lines of JSON on its input, answers on its output.

Ends when its input ends, whatever it is doing: nobody waits for it then. `python -m sana_export.inductor.worker`.
"""

import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path

# Ours, so that torch knows them when it reads a piece.
import sana_export.inductor.prepare  # noqa: F401
from sana_export.inductor.piece import load_exported, package_exported


def main() -> None:
    """Answer every request."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers print
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    while True:
        answers.write(json.dumps({"problem": _packaged(json.loads(requests.get()))}) + "\n")
        answers.flush()


def _read(requests: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        requests.put(line)
    if os.getpgrp() == os.getpid():  # as it is started: the compilers end with it
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _packaged(request: dict) -> str:
    """Why it failed, or nothing."""
    try:
        package_exported(load_exported(Path(request["source"])), Path(request["package"]), request["options"])
    except Exception as error:  # exporter, compilers and linker raise what they like
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    main()
