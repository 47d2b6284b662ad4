"""The task metrics under the name the build knows them by; they live with the data that carries the labels."""

from qexport.calibration.tasks import Spearman as Spearman
from qexport.calibration.tasks import Task as Task
from qexport.calibration.tasks import Top1 as Top1

__all__ = ["Spearman", "Task", "Top1"]
