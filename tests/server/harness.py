"""Starts real SGLang servers as processes, talks to them and takes them down whatever happens.

Used by the server tests and by the serving benchmark. Knows HTTP, processes and log files;
imports neither SGLang nor the plugin.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import requests

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

READY_TIMEOUT_S = 900.0
"""A start takes about 25 s on two free cores; tests may run beside other work."""
REQUEST_TIMEOUT_S = 3000.0
STOP_TIMEOUT_S = 20.0
LOG_TAIL_LINES = 60
RETRACTED = "#retracted_reqs: "
"""What SGLang's log has where running requests had to give their memory back."""
# Threads of GNU OpenMP wait for each other by spinning. Where other work wants the cores too, that
# makes a server several times slower; sleeping costs little. Benchmarks leave it as users have it.
SHARED_CORES = {"GOMP_SPINCOUNT": "0"}
# Asks the kernel to end a server whose starter has died, then becomes the server.
WITH_PARENT = (
    "import ctypes, os, signal, sys\n"
    "pr_set_pdeathsig = 1\n"
    "ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGTERM))\n"
    "os.execv(sys.argv[1], sys.argv[1:])\n"
)


class ServerError(RuntimeError):
    """A server did not start, died, or answered with an error; carries the end of its log."""


@dataclass(frozen=True)
class Answer:
    """One finished generation."""

    token_ids: list[int]
    text: str
    logprobs: list[float]
    """Log-probability of every token; empty unless asked for."""
    finish_reason: str
    """'length', 'stop' or 'abort'."""
    num_prompt_tokens: int


@dataclass(frozen=True)
class Chunk:
    """One event of a streamed generation."""

    at_s: float
    """``time.perf_counter()`` when it arrived."""
    num_tokens: int
    """Tokens generated so far."""
    text: str


class Server:
    """A running server. Made by `start_server`."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log_path: Path) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = log_path
        self._session = requests.Session()
        self._session.trust_env = False

    @property
    def pid(self) -> int:
        """Process id of the launcher, which leads the server's process group."""
        return self.process.pid

    @property
    def is_running(self) -> bool:
        """Whether the launcher has not ended."""
        return self.process.poll() is None

    def log(self) -> str:
        """Everything the server printed so far."""
        return self.log_path.read_text(errors="replace")

    def log_tail(self) -> str:
        """The last lines of the log, for failure messages."""
        return "\n".join(self.log().splitlines()[-LOG_TAIL_LINES:])

    def get(self, path: str, *, timeout_s: float = 120.0) -> requests.Response:
        """GET that raises `ServerError` when the server is gone or answers with an error."""
        return self._checked("GET", path, timeout_s=timeout_s)

    def post(
        self, path: str, payload: dict[str, Any], *, timeout_s: float = REQUEST_TIMEOUT_S
    ) -> requests.Response:
        """POST of a JSON payload, checked like `get`."""
        return self._checked("POST", path, timeout_s=timeout_s, json=payload)

    def _checked(self, method: str, path: str, *, timeout_s: float, **kw: Any) -> requests.Response:
        try:
            # Not the shared session: callers run in many threads.
            with requests.Session() as session:
                session.trust_env = False
                reply = session.request(method, self.url + path, timeout=timeout_s, **kw)
        except requests.RequestException as error:
            raise ServerError(f"{method} {path}: {error}\n{self.log_tail()}") from error
        if reply.status_code != requests.codes.ok:
            raise ServerError(f"{method} {path}: {reply.status_code} {reply.text[:500]}")
        return reply

    def is_healthy(self) -> bool:
        """Whether /health answers 200 now."""
        try:
            return self._session.get(self.url + "/health", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    def state(self) -> dict[str, Any]:
        """``internal_states[0]`` of /server_info."""
        state: dict[str, Any] = self.get("/server_info").json()["internal_states"][0]
        return state

    def heterocache(self) -> dict[str, Any]:
        """The policy's own part of /server_info."""
        state = self.state()
        if "heterocache" not in state:
            raise ServerError("/server_info has no 'heterocache': the policy is not active")
        part: dict[str, Any] = state["heterocache"]
        return part

    def generate(
        self, prompt: Sequence[int], num_tokens: int, *, with_logprobs: bool = False, **extra: Any
    ) -> Answer:
        """Greedy generation of exactly ``num_tokens`` tokens, end-of-text ignored."""
        reply = self.post("/generate", _payload(prompt, num_tokens, with_logprobs) | extra).json()
        meta = reply["meta_info"]
        return Answer(
            token_ids=reply["output_ids"],
            text=reply["text"],
            logprobs=[entry[0] for entry in meta.get("output_token_logprobs") or []],
            finish_reason=meta["finish_reason"]["type"],
            num_prompt_tokens=meta["prompt_tokens"],
        )

    def generate_all(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, *, with_logprobs: bool = False
    ) -> list[Answer]:
        """Like `generate` for several prompts at once, one connection each."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(
                pool.map(
                    lambda prompt: self.generate(prompt, num_tokens, with_logprobs=with_logprobs),
                    prompts,
                )
            )

    @contextlib.contextmanager
    def stream(
        self, prompt: Sequence[int], num_tokens: int, **extra: Any
    ) -> Iterator[Iterator[Chunk]]:
        """Streamed greedy generation; leaving the block early drops the connection."""
        payload = _payload(prompt, num_tokens, with_logprobs=False) | {"stream": True} | extra
        session = requests.Session()
        session.trust_env = False
        with (
            session,
            session.post(
                self.url + "/generate", json=payload, stream=True, timeout=REQUEST_TIMEOUT_S
            ) as reply,
        ):
            if reply.status_code != requests.codes.ok:
                raise ServerError(f"POST /generate: {reply.status_code} {reply.text[:500]}")
            yield _chunks(reply)

    def abort(self, request_id: str) -> None:
        """Ask for a request to be aborted; unknown ids are fine."""
        self.post("/abort_request", {"rid": request_id}, timeout_s=30)

    def num_running(self) -> tuple[int, int]:
        """Requests (running, waiting) as the scheduler last said."""
        load = self.get("/v1/loads").json()["loads"][0]
        return load["num_running_reqs"], load["num_waiting_reqs"]

    def wait_until_idle(self, timeout_s: float = 60.0) -> None:
        """Wait until nothing runs or waits."""
        wait_until(
            lambda: self.num_running() == (0, 0),
            timeout_s,
            lambda: f"the server is still busy: {self.num_running()}",
        )

    def sweep(self) -> None:
        """Make an idle server decode a little.

        Rows that were fetched for requests that have ended are dropped when a decode step begins.
        """
        self.wait_until_idle()
        self.generate(list(range(100, 108)), 3)  # so short that it keeps everything
        self.wait_until_idle()

    def wait_until_landed(self, timeout_s: float = 60.0) -> None:
        """Wait until nothing that was fetched is on its way."""

        def is_landed() -> bool:
            self.sweep()
            used: int = self.heterocache()["areas"]["landing"]["used_bytes"]
            return used == 0

        wait_until(is_landed, timeout_s, lambda: "rows are still on their way")

    def descendants(self) -> list[psutil.Process]:
        """All processes of the server, the launcher first."""
        try:
            root = psutil.Process(self.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """SIGKILL the launcher alone, as an out-of-memory killer would."""
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait(timeout=STOP_TIMEOUT_S)

    def stop(self) -> None:
        """End every process of the server, politely first; safe to call twice."""
        self._session.close()
        family = self.descendants()
        for sign in (signal.SIGTERM, signal.SIGKILL):
            # The group outlives its leader while any member is left.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=STOP_TIMEOUT_S)
            _, left = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
            for process in left if sign == signal.SIGKILL else []:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            # Of a launcher that was killed before nobody knows the family, but its group.
            if not left and not self._has_group():
                return

    def _has_group(self) -> bool:
        """Whether a member of its process group is left within a time that ending may take."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return False
            time.sleep(0.05)
        return True


def _payload(prompt: Sequence[int], num_tokens: int, with_logprobs: bool) -> dict[str, Any]:
    sampling = {"max_new_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True}
    payload: dict[str, Any] = {"input_ids": list(prompt), "sampling_params": sampling}
    return payload | {"return_logprob": True} if with_logprobs else payload


def _chunks(reply: requests.Response) -> Iterator[Chunk]:
    # chunk_size=None hands data over as it arrives; the default would wait for 512 bytes.
    for line in reply.iter_lines(chunk_size=None):
        if not line.startswith(b"data:"):
            continue
        body = line.removeprefix(b"data:").strip()
        if body == b"[DONE]":
            return
        event = json.loads(body)
        if "error" in event:
            raise ServerError(f"stream: {event['error']}")
        yield Chunk(time.perf_counter(), event["meta_info"]["completion_tokens"], event["text"])


def wait_until(
    is_done: Callable[[], bool],
    timeout_s: float,
    message: Callable[[], str],
    *,
    interval_s: float = 0.2,
) -> None:
    """Poll until a condition holds.

    Raises:
        TimeoutError: it did not hold in time; the text is ``message()`` of that moment.
    """
    deadline = time.monotonic() + timeout_s
    while not is_done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout_s:.0f} s: {message()}")
        time.sleep(interval_s)


def free_port() -> int:
    """A TCP port that is free, and that the system does not give to anybody by itself.

    A server takes its port many seconds after it was chosen.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def launch_command(
    model_dir: Path, port: int, flags: Sequence[str], *, max_total_tokens: int, dtype: str
) -> list[str]:
    """Command line of a server on the CPU."""
    return [
        *(sys.executable, "-m", "sglang.launch_server"),
        *("--model-path", str(model_dir)),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--device", "cpu", "--dtype", dtype),
        *("--max-total-tokens", str(max_total_tokens)),
        "--sleep-on-idle",
        *flags,
    ]


def spawn(
    command: Sequence[str], directory: Path, log_path: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a command as leader of a new process group, its output going to a file.

    It ends when this thread ends, even by SIGKILL.

    Args:
        command: Program and arguments.
        directory: Working directory. Never the repository's root: a folder named like an
            installed package would be imported in its place.
        log_path: Takes stdout and stderr.
        environment: Variables beside this process's own.
    """
    required = {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONUNBUFFERED": "1"}
    # Kernels that are interpreted are for tests within this process.
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with log_path.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", WITH_PARENT, *command],
            cwd=directory,
            env=own | required | dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@contextlib.contextmanager
def start_server(
    model_dir: Path,
    directory: Path,
    *flags: str,
    max_total_tokens: int = 32768,
    dtype: str = "float32",
    environment: Mapping[str, str] = SHARED_CORES,
) -> Iterator[Server]:
    """A server that answers /health, for the length of the block.

    Args:
        model_dir: Transformers directory of the model.
        directory: Empty or missing directory for the log; the server's working directory.
        flags: More arguments of ``sglang.launch_server``.
        max_total_tokens: KV capacity in tokens.
        dtype: Weights and KV.
        environment: Variables beside this process's own.

    Raises:
        ServerError: it ended or was not healthy in time; with the end of its log.
    """
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = launch_command(model_dir, port, flags, max_total_tokens=max_total_tokens, dtype=dtype)
    log_path = directory / "server.log"
    server = Server(spawn(command, directory, log_path, environment), port, log_path)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        server.stop()


def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not server.is_healthy():
        code = server.process.poll()
        if code is not None:
            raise ServerError(f"the server ended with {code}\n{server.log_tail()}")
        if time.monotonic() > deadline:
            raise ServerError(f"not healthy in {READY_TIMEOUT_S:.0f} s\n{server.log_tail()}")
        time.sleep(0.5)


def run_to_refusal(
    model_dir: Path, directory: Path, *flags: str, timeout_s: float = READY_TIMEOUT_S
) -> tuple[int, str]:
    """Start a server that ought to refuse; its exit code and everything it printed.

    Raises:
        ServerError: it was still running after ``timeout_s`` or became healthy.
    """
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = launch_command(model_dir, port, flags, max_total_tokens=4096, dtype="float32")
    log_path = directory / "server.log"
    server = Server(spawn(command, directory, log_path, SHARED_CORES), port, log_path)
    try:
        deadline = time.monotonic() + timeout_s
        while (code := server.process.poll()) is None:
            if server.is_healthy():
                raise ServerError(f"it serves instead of refusing {flags}")
            if time.monotonic() > deadline:
                raise ServerError(f"neither serves nor ends\n{server.log_tail()}")
            time.sleep(0.25)
        return code, server.log()
    finally:
        server.stop()
