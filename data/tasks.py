"""The registry of tasks: what `python -m data`, train.py, decode.py and `SpanLM.load` know by name."""

from typing import Any

from data.arithmetic import ArithmeticTask
from data.news import NewsTask

TASKS: dict[str, Any] = {
    "arithmetic": ArithmeticTask,
    "news": NewsTask,
}
