from maskwright.inputs.almguard.method import AlmGuard as AlmGuard
