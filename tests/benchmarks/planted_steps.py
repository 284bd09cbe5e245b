"""Steps for the tests of ``gpu``: some do what no step should. Imports nothing heavy."""

import importlib
import os
import subprocess
import sys
import time

from benchmarks.gpu_worker import StepReport, StepSetting


def ahead() -> None:
    print("imported ahead", flush=True)


def fine(setting: StepSetting, report: StepReport) -> None:
    report.row("answer", {"is": 42.0})
    report.check("error", 0.5, at_most=1.0)
    print("a library's chatter")


def wrong(setting: StepSetting, report: StepReport) -> None:
    report.check("error", 2.0, at_most=1.0)
    report.check("another", 0.5, at_most=1.0)


def not_a_number(setting: StepSetting, report: StepReport) -> None:
    report.check("error", float("nan"), at_most=1.0)


def hangs(setting: StepSetting, report: StepReport) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report.row("before", {"child": child.pid})
    time.sleep(600)


def dies(setting: StepSetting, report: StepReport) -> None:
    report.row("before", {"is": 1})
    os.abort()


def raises(setting: StepSetting, report: StepReport) -> None:
    raise RuntimeError("an illegal memory access was encountered")


def imports(setting: StepSetting, report: StepReport, *, package: str) -> None:
    report.require("answer", importlib.import_module(package).ANSWER == 42, "it")
