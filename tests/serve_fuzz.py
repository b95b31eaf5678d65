"""schemathesis against a server over a tiny model: no 5xx, no reply that the OpenAPI document does not describe.

    python tests/serve_fuzz.py [--examples 200] [--seed 1] [--workers 1] [--model FILE] [options of schemathesis]

All of its checks that are on by default stay on; data that fit the document may still be answered with 400, as ids of
tokens, lengths, templates and schemas have bounds that no document can tell. So that this lets no server pass that
refuses everything, each path must have answered at least once with a 2xx. Afterwards the server must still be well:
nothing runs or waits, no block of the KV cache is held, no reply was a 5xx, and its log has no traceback. Exit code 1
otherwise.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from serve_process import KEY, Served
from tiny import make_tiny_model

SCHEMATHESIS = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]

PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/models", "/tokenize",
    "/detokenize",
)  # fmt: skip
SETTINGS = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "401", "404", "413", "429"]
"""


def fuzz(server: Served, folder: Path, examples: int, seed: int, workers: int = 1, *more: str) -> tuple[list[str], str]:
    """What is wrong, and what schemathesis printed; folder: for its own files."""
    (folder / "schemathesis.toml").write_text(SETTINGS, encoding="utf-8")
    before, answered = server.statuses(), served(server)
    done = subprocess.run(
        [
            *SCHEMATHESIS, server.url + "/openapi.json", "--header", f"Authorization: Bearer {KEY}",
            "--workers", str(workers), "--max-examples", str(examples), "--seed", str(seed),
            "--generation-database", "none", "--no-color",
            "--request-timeout", "120", "--suppress-health-check", "all", *more,
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
    )  # fmt: skip
    problems = [] if done.returncode == 0 else [f"schemathesis: exit code {done.returncode}"]
    if server.process.poll() is not None:
        return [*problems, "the server is gone:", *server.log[-30:]], done.stdout
    after = server.settled()
    if not after.running == after.waiting == after.blocks == 0:
        problems.append(f"the server still holds something: {after}")
    statuses = server.statuses()
    problems += [
        f"{n} replies {status}" for status, n in statuses.items() if status[0] == "5" and n > before.get(status, 0)
    ]
    now = served(server)
    problems += [f"{path}: no reply was a 2xx" for path in PATHS if now.get(path, 0) == answered.get(path, 0)]
    problems += [line for line in server.log if "Traceback" in line or "error:" in line]
    return problems, done.stdout


def served(server: Served) -> dict[str, int]:
    """How many replies of each path had status 200."""
    _, text = server.get("/metrics")
    found = re.findall(r'hotcold_requests_total\{path="([^"]*)",status="200"\} (\S+)', text)
    return {path: int(float(n)) for path, n in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--model", type=Path, help="default: a tiny one, made for this")
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        model = options.model or make_tiny_model(Path(name) / "tiny.gguf", n_ctx_train=256)
        with Served(model, "--ctx", "256", "--parallel", "4", "--threads", "1") as server:
            problems, printed = fuzz(server, Path(name), options.examples, options.seed, options.workers, *more)
            statuses = server.statuses()
    print(printed)
    print("replies by status:", dict(sorted(statuses.items())))
    print("\n".join(problems) or "nothing wrong")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
