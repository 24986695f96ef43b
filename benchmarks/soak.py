"""Eight clients at the OpenAI endpoint for half an hour: is every answer right, and does nothing grow?

    python benchmarks/soak.py [--minutes 30] [--clients 8] [--model smollm2-135m] [--precision int8]

The clients ask at random for whole answers and streams, send bad requests, and leave in the middle of an
answer. Every greedy answer is compared with the model's own. Memory (what only the server's processes have)
and open handles are read once a second; compared are the medians of the first and the last quarter, without
the WARM_UP, in which caches fill. Writes out/soak.json, or to another folder with --output; exits with 1 when
a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import machine
import mlflow
import psutil
import serving
import traffic
from tqdm import tqdm

from helpers import tracking
from helpers.environment import ROOT
from helpers.models import catalog, export

PACKAGES = ("fastapi", "uvicorn", "httpx")
WARM_UP = 180  # seconds, but no more than half of the time
LIMITS = (8, 24, 48)  # tokens


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", default="int8")  # whose answers do not depend on their batch
    parser.add_argument(
        "--growth", type=float, default=1.05, help="highest last ÷ first quarter (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "out", help="folder of soak.json (default: out)"
    )
    options = parser.parse_args()
    if options.minutes <= 0 or options.clients < 1:
        parser.error("--minutes must be above 0 and --clients at least 1")
    with tempfile.TemporaryDirectory() as folder:
        tracking.connect(f"sqlite:///{folder}/mlflow.db", "benchmark")
        model = catalog.find(options.model)
        onnx = export.onnx_folder(model, options.precision)
        uri = serving.register("slm-onnx", onnx, model.system_message)
        wrapper = mlflow.pyfunc.load_model(uri).unwrap_python_model()
        requests = traffic.Traffic(wrapper, "slm-onnx", *chats(), model.system_message)
        figures = soak(uri, requests, options.clients, 60 * options.minutes)
    failed = checks(figures, options.growth)
    settings = vars(options) | {"output": None, "kinds": traffic.KINDS}
    machine.write(
        "soak", {"settings": settings, "figures": figures, "failed": failed}, *PACKAGES, folder=options.output
    )
    print(table(figures))
    for sentence in failed:
        print(f"FAILED: {sentence}", file=sys.stderr)
    return 1 if failed else 0


def chats() -> tuple[list[list[dict]], list[int]]:
    """Short ones, ones with a history, and ones that are longer than what is read in one step."""
    found = []
    for number, topic in enumerate(traffic.TOPICS):
        question = {"role": "user", "content": f"Tell me something about {topic}."}
        history = [
            {"role": "user", "content": "Hello!"},
            {"role": "assistant", "content": "Hello! How can I help you?"},
        ]
        text = f"The story of {topic} is long, and it begins on a day in May. " * (20 + number)
        long = {"role": "user", "content": f"Summarise this: {text}"}
        found += [[question], [*history, question], [long]]
    return found, [LIMITS[number % len(LIMITS)] for number in range(len(found))]


def soak(uri: str, requests: traffic.Traffic, clients: int, seconds: float) -> dict:
    """The figures of a run; it ends early if the server does."""
    replies: list[traffic.Reply] = []
    errors: list[str] = []
    with serving.endpoint(uri) as (url, process):
        family = [psutil.Process(process.pid), *serving.children(process)]
        until = time.monotonic() + seconds
        threads = [
            threading.Thread(target=client, args=(url, process, requests, seed, until, replies, errors))
            for seed in range(clients)
        ]
        for thread in threads:
            thread.start()
        samples = watch(family, until, seconds, replies)
        for thread in threads:
            thread.join()
        died = len(family) - len(living(family))
        unfinished = in_progress(url)
        alive = serving.healthy(url)
        left = len(living(family)) if died else serving.left_after_sigterm(process)
    for error in [*(f"{r.kind} {r.chat} {r.status} {r.text[:200]}" for r in replies if not r.right), *errors][
        :5
    ]:
        print("wrong:", error, file=sys.stderr)
    return {
        "minutes": round(seconds / 60, 2),
        "clients": clients,
        "requests": len(replies),
        "answered 200": sum(reply.status == 200 and not reply.given_up for reply in replies),
        "refused 4xx": sum(400 <= reply.status < 500 for reply in replies),
        "answered 5xx": sum(reply.status >= 500 for reply in replies),
        "left by the client": sum(reply.given_up for reply in replies),
        "compared with the greedy reference": sum(reply.compared for reply in replies),
        "wrong answers": sum(not reply.right for reply in replies) + len(errors),
        "stack traces leaked": sum(reply.leaks for reply in replies),
        "server processes that died": died,
        "healthy afterwards": alive,
        "requests left in progress": unfinished,
        "processes left after SIGTERM": left,
        **percentiles("whole answer, s", [r.seconds for r in replies if r.kind == "whole"]),
        **percentiles("streamed answer, s", [r.seconds for r in replies if r.kind == "stream"]),
        **percentiles("first streamed text, s", [r.first_token for r in replies if r.first_token]),
        **growth(samples),
    }


def client(
    url: str,
    process: subprocess.Popen,
    requests: traffic.Traffic,
    seed: int,
    until: float,
    replies: list,
    errors: list[str],
) -> None:
    """One client: a request when the last one is over, until the time is up or the server has gone."""
    chance = random.Random(seed)
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as session:
        while time.monotonic() < until and process.poll() is None:
            kind, chat = chance.choice(traffic.KINDS), chance.randrange(len(requests.chats))
            try:
                reply = requests.send(session, kind, chat, chance)
            except Exception as error:  # the server broke off, say: a wrong answer like any other
                errors.append(f"{kind} {chat} {error!r}")
                time.sleep(0.1)
                continue
            if reply.right and not reply.leaks:
                reply.text = ""  # not kept: this process need not grow either
            replies.append(reply)


def watch(
    family: list[psutil.Process], until: float, seconds: float, replies: list
) -> list[tuple[float, int]]:
    """Bytes of memory and number of handles of all the server's processes, once a second while all live."""
    samples = []
    with tqdm(total=round(seconds), unit="s", disable=None) as bar, contextlib.suppress(psutil.Error):
        while (rest := until - time.monotonic()) > 0:
            samples.append((sum(member.memory_full_info().uss for member in family), handles(family)))
            bar.set_postfix(requests=len(replies), MB=round(samples[-1][0] / 1e6), handles=samples[-1][1])
            bar.update(round(seconds - rest) - bar.n)
            time.sleep(min(1, rest))
    return samples


def handles(family: list[psutil.Process]) -> int:
    """Open files, sockets and pipes."""
    return sum(member.num_fds() if hasattr(member, "num_fds") else member.num_handles() for member in family)


def living(family: list[psutil.Process]) -> list[psutil.Process]:
    return [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]


def in_progress(url: str, patience: float = 30) -> int | str:
    """Requests that the server still works on after a while; "unknown" if it cannot be asked."""
    deadline = time.monotonic() + patience
    while True:
        try:
            lines = httpx.get(f"{url}/metrics", timeout=10, trust_env=False).text.splitlines()
        except httpx.TransportError:
            return "unknown"
        number = next(line.split()[-1] for line in lines if line.startswith("chat_requests_in_progress"))
        if not float(number) or time.monotonic() > deadline:
            return int(float(number))
        time.sleep(0.2)


def percentiles(name: str, values: list[float]) -> dict:
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"{name}: p{p}": round(cuts[p - 1], 3) for p in (50, 95, 99)}


def growth(samples: list[tuple[float, int]]) -> dict:
    """Medians of the quarters after the warm-up, and the last ÷ the first; one sample a second."""
    kept = samples[min(WARM_UP, len(samples) // 2) :]
    if len(kept) < 4:
        return {}
    size, figures = len(kept) // 4, {}
    for column, (name, scale) in enumerate({"memory, MB": 1e6, "handles": 1}.items()):
        parts = [kept[i * size : (i + 1) * size] for i in range(4)]
        medians = [statistics.median(sample[column] for sample in part) for part in parts]
        figures[f"{name}, by quarter"] = [round(median / scale, 1) for median in medians]
        figures[f"{name}, last ÷ first quarter"] = round(medians[-1] / medians[0], 3)
    return figures


def table(figures: dict) -> str:
    """The figures in Markdown."""
    rows = [
        (name, " → ".join(map(str, value)) if isinstance(value, list) else value)
        for name, value in figures.items()
    ]
    return "\n".join(["| figure | value |", "|---|--:|", *(f"| {name} | {value} |" for name, value in rows)])


def checks(figures: dict, limit: float) -> list[str]:
    """What is not as it should be, in sentences."""
    zero = ("answered 5xx", "wrong answers", "stack traces leaked", "server processes that died")
    zero += ("requests left in progress", "processes left after SIGTERM")
    failed = [f"{name}: {figures[name]}, not 0" for name in zero if figures[name]]
    ratios = {name: value for name, value in figures.items() if "÷" in name}
    failed += [f"{name}: {value}, above {limit}" for name, value in ratios.items() if value > limit]
    if not ratios:
        failed.append("growth could not be judged: the run was too short")
    if not figures["compared with the greedy reference"]:
        failed.append("no answer was compared")
    return failed if figures["healthy afterwards"] else [*failed, "the server was not healthy afterwards"]


if __name__ == "__main__":
    sys.exit(main())
