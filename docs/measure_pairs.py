"""How fast one process of `apo-trl pairs build` asks: 10,000 rows, 64 requests in flight, a server that takes 50 ms.

    python docs/measure_pairs.py [--rows 10000] [--concurrency 64] [--latency 0.05]

The server (tests/chat_server.py) is a process of its own and shares the machine. The rate is that of the whole command,
from its start to the last file; ideal is concurrency over latency.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SERVER = Path(__file__).parent.parent / "tests" / "chat_server.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.05)
    options = parser.parse_args()
    measured = measure(options.rows, options.concurrency, options.latency)
    print(
        f"{measured['rows']:,} rows, {measured['requests']:,} requests in {measured['seconds']:.1f} s: "
        f"{measured['rate']:,.0f} a second, {measured['share']:.0%} of the ideal {measured['ideal']:,.0f}; "
        f"asking alone {measured['asking']:,.0f} a second ({measured['asking'] / measured['ideal']:.0%}); "
        f"{measured['megabytes']:.0f} MB at most."
    )


def measure(rows: int, concurrency: int, latency: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        with prompts.open("w", encoding="utf-8") as file:
            for row in range(rows):
                text = f"Question {row}: " + "please explain this in detail. " * 10
                file.write(json.dumps({"id": str(row), "prompt": text}) + "\n")
        command = [sys.executable, str(SERVER), "--latency", str(latency)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            url = server.stdout.readline().strip()
            recipe = {"method": "clair", "prompts": str(prompts), "output_dir": f"{folder}/pairs"}
            recipe |= {"concurrency": concurrency, "policy_model": "a", "reviser_model": "b"}
            recipe |= {"policy_base_url": url, "reviser_base_url": url}
            (Path(folder) / "recipe.yaml").write_text(json.dumps(recipe))
            began, most = time.perf_counter(), 0
            command = [sys.executable, "-m", "apo_trl.cli.main", "pairs", "build", f"{folder}/recipe.yaml"]
            with (Path(folder) / "log").open("w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as build:
                while build.poll() is None:
                    most = max(most, _held(build.pid))
                    time.sleep(0.02)
                seconds = time.perf_counter() - began
            server.terminate()
            server.communicate()
        assert build.returncode == 0, (Path(folder) / "log").read_text()
        report = json.loads((Path(folder) / "pairs" / "report.json").read_text())
        lines = [line for line in (Path(folder) / "log").read_text().splitlines() if line.startswith("rows ")]
    assert report["kept"] == rows
    requests = sum(role["requests"] for role in report["roles"].values())
    ideal = concurrency / latency
    return {
        "rows": rows, "requests": requests, "seconds": seconds, "rate": requests / seconds, "ideal": ideal,
        "share": requests / seconds / ideal, "asking": _asking(lines[-1]), "megabytes": most / 1024,
    }  # fmt: skip


def _held(process: int) -> int:
    """The most memory that a process has held so far, in kB (Linux)."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def _asking(line: str) -> float:
    """The rate that the run's own last line of progress gives."""
    return float(line.split("requests")[1].split("(")[1].split("/s")[0])


if __name__ == "__main__":
    main()
