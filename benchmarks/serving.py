"""What the OpenAI endpoint costs and gains, beside Python, MLflow's server and LitServe's OpenAI spec.

    python benchmarks/serving.py [--repeats 5] [--requests 1000] [--model smollm2-135m] [--precision int4]

About five minutes on two quiet cores. Prints a table and writes benchmarks/results/serving.json. What is
compared runs in turns, `--repeats` times; shown are medians. Tokens are those of each answer's `usage`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import machine
import mlflow
import openai
import psutil
import traffic

from helpers import processes, tracking
from helpers.models import catalog, export, onnx_chat_model
from helpers.serving import mlflow_server

PACKAGES = ("fastapi", "uvicorn", "openai", "litserve")
TOKENS = 64
PROMPTS = [f"Write a long story about {topic}." for topic in traffic.TOPICS]
LONG_PROMPT = (
    "Summarise this: " + "The quick brown fox jumps over the lazy dog again and then rests. " * 231
)  # 3,005 words


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1000, help="of the mix of good and bad ones")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", default="int4")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tracking.connect(f"sqlite:///{folder}/mlflow.db", "benchmark")
        model = catalog.find(options.model)
        uri = register("slm-onnx", export.onnx_folder(model, options.precision), model.system_message)
        tiny = register("tiny", export.onnx_folder(catalog.find("tiny-phi3"), "fp32"), None)
        figures = throughput(uri, options.repeats) | health(uri) | mixed(tiny, options.requests)
    machine.write("serving", {"settings": vars(options), "figures": figures}, *PACKAGES)
    for name, value in figures.items():
        print(f"{name:<72}{value:>12}")


def register(name: str, folder: Path, system_message: str | None) -> str:
    with mlflow.start_run():
        mlflow.pyfunc.log_model(
            python_model=onnx_chat_model.__file__,
            artifacts={"phi3-mini-onnx": str(folder)},
            name="phi3-mlflow-model",
            registered_model_name=name,
            pip_requirements=tracking.requirements("mlflow", "onnxruntime-genai"),
            metadata={} if system_message is None else {"system_message": system_message},
            input_example=({"prompt": ["Hello"]}, {"max_new_tokens": 1}),
        )
    return f"models:/{name}/1"


# ---- servers ----


@contextlib.contextmanager
def server(code: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """A Python process that serves at {port}, once it is healthy; killed with all its children at the end."""
    port = processes.free_port()
    folder = Path(tempfile.mkdtemp())
    script, log = folder / "server.py", folder / "log.txt"
    script.write_text(code.replace("{port}", str(port)), encoding="utf-8")
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen([sys.executable, script], stdout=output, stderr=output)
    root = psutil.Process(process.pid)
    try:
        while not healthy(f"http://127.0.0.1:{port}"):
            if process.poll() is not None:
                raise RuntimeError(log.read_text("utf-8"))
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process
    finally:
        processes.end([root], seconds=0)
        process.wait()
        shutil.rmtree(folder)


def endpoint(uri: str) -> contextlib.AbstractContextManager:
    store = mlflow.get_tracking_uri()
    return server(
        "from helpers.serving.openai_server import serve\n"
        f"if __name__ == '__main__':\n    serve({uri!r}, port={{port}}, tracking_uri={store!r})\n"
    )


def healthy(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    return False


def children(process: subprocess.Popen) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def left_after_sigterm(process: subprocess.Popen) -> int:
    """How many processes outlive a SIGTERM to the server's first one; these are then killed.

    It has ten seconds to end, and all together have ten more.
    """
    family = [psutil.Process(process.pid), *children(process)]
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    _gone, rest = psutil.wait_procs(family, timeout=10)
    rest = [process for process in rest if process.status() != psutil.STATUS_ZOMBIE]
    for orphan in rest:
        orphan.kill()
    return len(rest)


# ---- throughput ----


@functools.cache
def client(url: str) -> openai.OpenAI:
    """One for all requests to a server, as in a real program: to make one takes 21 ms of the processor."""
    direct = openai.DefaultHttpxClient(trust_env=False)  # past any proxy: the server is on this machine
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key="unused", timeout=300, max_retries=0, http_client=direct
    )


def ask(url: str, prompt: str, tokens: int = TOKENS, **options):
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": prompt}]
    create = client(url).chat.completions.create
    return create(model="slm-onnx", messages=messages, max_tokens=tokens, **options)


def tokens_per_second(answer: Callable[[str], int], clients: int) -> float:
    """All prompts, asked by so many threads, each going on when it has its answer."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        tokens = sum(pool.map(answer, PROMPTS))
    return tokens / (time.perf_counter() - began)


def first_token(url: str) -> float:
    """Milliseconds from the call to the first text of a stream, median of 20."""
    times = []
    for _ in range(20):
        began = time.perf_counter()
        chunks = ask(url, PROMPTS[0], tokens=4, stream=True)
        next(chunk for chunk in chunks if chunk.choices[0].delta.content)
        times.append(1000 * (time.perf_counter() - began))
        list(chunks)
    return round(statistics.median(times), 1)


def throughput(uri: str, repeats: int) -> dict:
    """Python, the endpoint and LitServe in turns, each with one caller and with eight."""
    wrapper = mlflow.pyfunc.load_model(uri).unwrap_python_model()

    def in_python(prompt: str) -> int:
        messages = [{"role": "system", "content": ""}, {"role": "user", "content": prompt}]
        ids = wrapper.encode_messages(messages)
        return wrapper.generate([ids], {"max_new_tokens": TOKENS})[0].result().completion_tokens

    with endpoint(uri) as (url, process), litserve(uri) as (peer_url, peer):
        callers = {
            "Python": in_python,
            "endpoint": lambda prompt: ask(url, prompt).usage.completion_tokens,
            "LitServe": lambda prompt: ask(peer_url, prompt).usage.completion_tokens,
        }
        rounds: dict[tuple[str, int], list[float]] = {(name, n): [] for n in (1, 8) for name in callers}
        for turn in range(repeats + 1):  # the first one warms up
            for (name, clients), speeds in rounds.items():
                speed = tokens_per_second(callers[name], clients)
                speeds += [speed] if turn else []
        first = {"endpoint": first_token(url), "LitServe": first_token(peer_url)}
        after = {"endpoint": after_leaving(url, process), "LitServe": after_leaving(peer_url, peer)}

    def ratio(above: tuple[str, int], below: tuple[str, int]) -> float:
        pairs = zip(rounds[above], rounds[below], strict=True)
        return round(statistics.median(high / low for high, low in pairs), 2)

    figures = {
        f"{name}, {n} at once, tok/s": round(statistics.median(v), 1) for (name, n), v in rounds.items()
    }
    figures["Python, 8 callers / 1"] = ratio(("Python", 8), ("Python", 1))
    for name in ("endpoint", "LitServe"):
        figures |= {
            f"{name} / Python, 1 at once": ratio((name, 1), ("Python", 1)),
            f"{name} / Python, 8 at once": ratio((name, 8), ("Python", 8)),
            f"{name}, 8 clients / 1": ratio((name, 8), (name, 1)),
            f"{name}, first streamed token, ms": first[name],
            **{f"{name}, {what}": value for what, value in after[name].items()},
        }
    return figures


def after_leaving(url: str, process: subprocess.Popen) -> dict:
    """What a server still does when the client of a long answer has gone, and after a SIGTERM."""
    family = [psutil.Process(process.pid), *children(process)]

    def processor_seconds() -> float:
        return sum(sum(member.cpu_times()[:2]) for member in family)

    stream = ask(url, PROMPTS[0], tokens=2000, stream=True)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    stream.close()
    time.sleep(0.5)
    before = processor_seconds()
    time.sleep(3)
    return {
        "CPU s used in 3 s after the client went": round(processor_seconds() - before, 2),
        "processes": len(family),
        "processes left after SIGTERM": left_after_sigterm(process),
    }


# ---- health ----


def health(uri: str) -> dict:
    """The slowest health probe while a 3,000-word prompt is read, by the endpoint and by MLflow's server."""
    figures = {"words in the long prompt": len(LONG_PROMPT.split())}
    with endpoint(uri) as (url, _):
        figures |= probe("endpoint", url, lambda: ask(url, LONG_PROMPT, tokens=1))
    with mlflow_server.serve(uri, timeout=300) as url:
        body = {"inputs": {"prompt": [LONG_PROMPT]}, "params": {"max_new_tokens": 1}}
        figures |= probe(
            "mlflow models serve",
            url,
            lambda: httpx.post(
                f"{url}/invocations", json=body, timeout=300, trust_env=False
            ).raise_for_status(),
        )
    return figures


def probe(name: str, url: str, read: Callable[[], object]) -> dict:
    times = []
    reader = threading.Thread(target=read)
    began = time.perf_counter()
    reader.start()
    with httpx.Client(timeout=300, trust_env=False) as client:
        while reader.is_alive():
            sent = time.perf_counter()
            client.get(f"{url}/health").raise_for_status()
            times.append(1000 * (time.perf_counter() - sent))
            time.sleep(0.02)
    return {
        f"{name}: reading it, s": round(time.perf_counter() - began, 2),
        f"{name}: slowest health probe meanwhile, ms": round(max(times), 1),
        f"{name}: median health probe, ms": round(statistics.median(times), 1),
    }


# ---- good and bad requests ----


def mixed(uri: str, count: int) -> dict:
    """Requests of all kinds from 16 callers at once; what is wrong, what leaks, what is left."""
    wrapper = mlflow.pyfunc.load_model(uri).unwrap_python_model()
    chats = [[{"role": "user", "content": f"Question {n}: why?"}] for n in range(20)]
    requests = traffic.Traffic(wrapper, "tiny", chats, [32] * len(chats))
    chance = random.Random(0)
    plan = [(chance.choice(traffic.KINDS), chance.randrange(len(chats))) for _ in range(count)]
    with endpoint(uri) as (url, process):
        with (
            httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
            ThreadPoolExecutor(16) as pool,
        ):
            replies = list(pool.map(lambda item: requests.send(client, *item, chance), plan))
        alive = healthy(url)
        left = left_after_sigterm(process)
    wrong = [reply for reply in replies if not reply.right]
    for reply in wrong[:5]:
        print("wrong:", reply.kind, reply.chat, reply.status, reply.text[:200], file=sys.stderr)
    statuses = [reply.status for reply in replies]
    return {
        "mixed requests sent": count,
        "mixed requests: answered 200": statuses.count(200),
        "mixed requests: refused 4xx": sum(400 <= status < 500 for status in statuses),
        "mixed requests: answered 5xx": sum(status >= 500 for status in statuses),
        "mixed requests: compared with the model's own answer": sum(reply.compared for reply in replies),
        "mixed requests: given up by the client": sum(reply.given_up for reply in replies),
        "mixed requests: wrong answers": len(wrong),
        "mixed requests: stack traces leaked": sum(reply.leaks for reply in replies),
        "mixed requests: healthy afterwards": "yes" if alive else "no",
        "mixed requests: processes left after SIGTERM": left,
    }


# ---- LitServe ----

LITSERVE = """
import asyncio
import litserve
import mlflow

class Chat(litserve.LitAPI):
    def setup(self, device):
        mlflow.set_tracking_uri(STORE)
        self.model = mlflow.pyfunc.load_model(MODEL).unwrap_python_model()

    async def predict(self, request):
        messages = [{"role": message.role, "content": message.content} for message in request.messages]
        params = {"max_new_tokens": request.max_tokens}
        completion = self.model.generate([self.model.encode_messages(messages)], params)[0]
        pieces = iter(completion)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield {"role": "assistant", "content": piece}
        read, written = completion.prompt_tokens, completion.completion_tokens
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        yield {"role": "assistant", "content": "", **usage}

if __name__ == "__main__":
    api = Chat(spec=litserve.OpenAISpec(), enable_async=True)
    server = litserve.LitServer(api, accelerator="cpu", timeout=False)
    server.run(host="127.0.0.1", port={port}, generate_client_file=False, log_level="warning")
"""


def litserve(uri: str) -> contextlib.AbstractContextManager:
    """The same model behind LitServe's OpenAISpec, as its documentation shows it."""
    return server(f"STORE, MODEL = {mlflow.get_tracking_uri()!r}, {uri!r}\n{LITSERVE}")


if __name__ == "__main__":
    main()
