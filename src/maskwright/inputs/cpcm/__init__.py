from maskwright.inputs.cpcm.method import Cpcm as Cpcm
