"""The node's parameters: declared from, and checked by, ``bevperception.streaming.settings``."""

from __future__ import annotations

from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter

from bevperception.errors import ConfigError
from bevperception.streaming.settings import NodeSettings, Spec, defaults, spec_by_name


def declare(node: Node) -> NodeSettings:
    """Declare all parameters.

    Returns:
        their values.

    Raises:
        ConfigError: if one is wrong.
    """
    for name, default, spec in defaults():
        value = list(default) or [""] if isinstance(default, tuple) else default
        node.declare_parameter(name, value, _descriptor(spec, default))
    return read(node)


def read(node: Node) -> NodeSettings:
    """The values of all parameters.

    Raises:
        ConfigError: if one is wrong.
    """
    return NodeSettings().changed({name: node.get_parameter(name).value for name in spec_by_name()}, False)


def check_changes(
    current: NodeSettings, changes: list[Parameter], configured: bool
) -> tuple[SetParametersResult, NodeSettings]:
    """Check changes of parameters, for ``add_on_set_parameters_callback``.

    Args:
        current: the values now.
        changes: as rclpy hands them over; parameters that this package did not declare are let through.
        configured: whether only live parameters may change.

    Returns:
        whether they are allowed, with the reason, and the values afterwards.
    """
    values = {change.name: change.value for change in changes if change.name in spec_by_name()}
    try:
        return SetParametersResult(successful=True), current.changed(values, configured)
    except ConfigError as error:
        return SetParametersResult(successful=False, reason=str(error)), current


def _descriptor(spec: Spec, default: Any) -> ParameterDescriptor:
    descriptor = ParameterDescriptor(description=spec.description)
    if spec.choices:
        descriptor.additional_constraints = f"one of {', '.join(spec.choices)}"
    elif not spec.live:
        descriptor.additional_constraints = "can change only before configuring"
    if spec.low is not None and spec.high is not None:
        if isinstance(default, float):
            limits = FloatingPointRange(from_value=float(spec.low), to_value=float(spec.high), step=0.0)
            descriptor.floating_point_range = [limits]
        else:
            limits = IntegerRange(from_value=int(spec.low), to_value=int(spec.high), step=1)
            descriptor.integer_range = [limits]
    return descriptor
