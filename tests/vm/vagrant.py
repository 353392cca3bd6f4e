"""placeholder"""

from .machine import Machine


class Vagrant(Machine):
    pass
