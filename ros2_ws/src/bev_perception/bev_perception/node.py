"""The ROS 2 lifecycle node: a worker thread perceives image sets; results and diagnostics are published."""

from __future__ import annotations

import threading
import time

import torch
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from std_srvs.srv import SetBool, Trigger

from bev_perception import messages, parameters
from bev_perception.inputs import Inputs
from bev_perception.outputs import Outputs
from bevperception.errors import BevError
from bevperception.streaming import diagnostics
from bevperception.streaming.loading import load_predictor
from bevperception.streaming.pipeline import Pipeline

_POLL_S = 0.1
_WORKER_STOP_S = 10.0


class BevPerceptionNode(LifecycleNode):
    """Perceives a vehicle's surroundings: subscribes to cameras and publishes boxes and segmentation.

    Args:
        name: of the node.

    Raises:
        ConfigError: if a parameter is wrong.
    """

    def __init__(self, name: str = "bev_perception") -> None:
        super().__init__(name)
        self.settings = parameters.declare(self)
        self.problem = "not configured"
        self._pipeline: Pipeline | None = None
        self._inputs: Inputs | None = None
        self._outputs: Outputs | None = None
        self._worker: threading.Thread | None = None
        self._stop = threading.Event()
        self._active = False
        self._enabled = True
        self._active_since_s = 0.0
        self._worker_problem = ""
        self.add_on_set_parameters_callback(self._on_parameters)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # Diagnostics must come also while nobody publishes /clock.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._timer = self.create_timer(self.settings.diagnostics_period_s, self._on_timer, clock=steady)
        self.create_service(Trigger, "~/reset_memory", self._on_reset)
        self.create_service(SetBool, "~/enable", self._on_enable)

    # ------------------------------------------------------------ lifecycle

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the model and check all settings; on a fault log it and stay unconfigured."""
        try:
            loaded = load_predictor(self.settings)
            pipeline = Pipeline(loaded.predictor, loaded.channels, self.settings)
        except BevError as error:
            self.problem = f"configuring failed: {error}"
            self.get_logger().error(self.problem)
            return TransitionCallbackReturn.FAILURE
        self._pipeline = pipeline
        self._outputs = Outputs(self, loaded.segmentation, self.settings.base_frame)
        self._inputs = Inputs(self, pipeline, self.settings, self._is_awake)
        if messages.Detection3DArray is None:
            self.get_logger().info(
                "vision_msgs is not installed: no ~/output/detections, see ~/output/objects"
            )
        self.problem = "configured, not active"
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Warm the model up and start the worker."""
        assert self._pipeline is not None
        assert self._outputs is not None
        spent_ms = self._pipeline.warm_up()
        self._outputs.warm_up(self.settings)
        self.get_logger().info(f"warm: {spent_ms:.0f} ms a frame")
        self._active, self._active_since_s = True, time.monotonic()
        self._stop.clear()
        self._worker = threading.Thread(target=self._work, name="perception", daemon=True)
        done = super().on_activate(state)
        self._worker.start()
        return done

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop the worker; everything stays loaded."""
        self._pause()
        self.problem = "configured, not active"
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free everything."""
        self._free()
        self.problem = "not configured"
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free everything for good."""
        self._free()
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """An unexpected error in a transition: free everything and be unconfigured again."""
        self._free()
        self.problem = "a transition failed unexpectedly, see the log"
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        """End the worker before the node is destroyed."""
        self._pause()

    def _pause(self) -> None:
        self._active = False
        self._stop.set()
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.join(_WORKER_STOP_S)

    def _free(self) -> None:
        self._pause()
        if self._inputs is not None:
            self._inputs.destroy()
        if self._outputs is not None:
            self._outputs.destroy()
        self._pipeline = self._inputs = self._outputs = None

    # ------------------------------------------------------------ the worker thread

    def _is_awake(self) -> bool:
        return self._active and self._enabled

    def _work(self) -> None:
        if self.settings.threads > 0:
            torch.set_num_threads(self.settings.threads)
        pipeline, outputs = self._pipeline, self._outputs
        assert pipeline is not None
        assert outputs is not None
        while not self._stop.is_set():
            images = pipeline.wait(_POLL_S)
            if images is None or not self._is_awake():
                continue
            try:
                result = pipeline.process(images)
                if result.perception is not None and not self._stop.is_set():
                    stages = outputs.publish(result.stamp_ns, result.perception, self.settings)
                    pipeline.finished(result, stages)
                self._worker_problem = ""
            except Exception as error:  # one bad frame must not end perception; it is logged and shown
                self._worker_problem = f"a frame failed unexpectedly: {type(error).__name__}: {error}"
                self.get_logger().error(self._worker_problem, throttle_duration_sec=5.0)
                pipeline.reset()

    # ------------------------------------------------------------ parameters, services, diagnostics

    def _on_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        checked, self.settings = parameters.check_changes(self.settings, changes, self._pipeline is not None)
        if checked.successful and self._pipeline is not None:
            self._pipeline.change(self.settings)
        return checked

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self._pipeline is None:
            response.success, response.message = False, self.problem
            return response
        self._pipeline.reset()
        response.success, response.message = True, "the memory is empty"
        return response

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self._enabled = request.data
        self._active_since_s = time.monotonic()
        if self._pipeline is not None and request.data:
            self._pipeline.reset()
        response.success = True
        response.message = "inference is on" if request.data else "inference is off"
        return response

    def _on_timer(self) -> None:
        status = diagnostics.inactive(self.problem)
        if self._active and self._pipeline is not None:
            active_s = time.monotonic() - self._active_since_s
            status = diagnostics.statuses(self._pipeline.health(), self.settings, self._enabled, active_s)
            if self._worker_problem:
                level = diagnostics.Level.ERROR
                status.append(diagnostics.Status("worker", level, self._worker_problem))
        stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(messages.diagnostic_array(stamp, self.get_name(), status))
