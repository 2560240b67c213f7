"""MAE."""

from maskwright.inputs.mae.method import Mae as Mae
