"""Room: Model Breadcrumbs."""

from maskwright.updates.breadcrumbs.method import Breadcrumbs as Breadcrumbs
