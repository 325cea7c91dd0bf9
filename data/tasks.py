"""The registry of tasks: what `python -m data`, train.py, decode.py and `SpanLM.load` know by name."""

from data.arithmetic import ArithmeticTask
from data.news import NewsTask
from data.task import Task

TASKS: dict[str, type[Task]] = {
    "arithmetic": ArithmeticTask,
    "news": NewsTask,
}
