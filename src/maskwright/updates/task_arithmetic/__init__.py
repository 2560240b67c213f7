"""Room: task arithmetic."""

from maskwright.updates.task_arithmetic.method import TaskArithmetic as TaskArithmetic
