"""Masks on inputs: seeded samplers, and hide, visible and weigh for what they drop and keep."""

from maskwright.inputs.apply import Visible as Visible
from maskwright.inputs.apply import hide as hide
from maskwright.inputs.apply import masked_loss as masked_loss
from maskwright.inputs.apply import visible as visible
from maskwright.inputs.apply import weigh as weigh
from maskwright.inputs.method import InputMethod as InputMethod
from maskwright.inputs.method import Learner as Learner
from maskwright.inputs.method import Pretraining as Pretraining
from maskwright.inputs.method import Shown as Shown
from maskwright.inputs.patches import patches as patches
from maskwright.inputs.patches import spread as spread
from maskwright.inputs.patches import unpatched as unpatched
from maskwright.inputs.regions import Regions as Regions
from maskwright.inputs.samplers import Bands as Bands
from maskwright.inputs.samplers import Bernoulli as Bernoulli
from maskwright.inputs.samplers import Blocks as Blocks
from maskwright.inputs.samplers import Exact as Exact
from maskwright.inputs.samplers import Sampler as Sampler
from maskwright.inputs.samplers import Tubes as Tubes
from maskwright.inputs.samplers import Views as Views
from maskwright.inputs.samplers import salient as salient
