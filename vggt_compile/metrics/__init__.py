"""How far predicted cameras, depth and points are from the true ones, by the definitions of the published evaluations.

    pose_metrics(predicted, true)              # {"RRA@30": …, "RTA@30": …, "AUC@30": …, …} in percent
    trajectory_metrics(predicted, true)        # {"ATE": …, "RPE_trans": …, "RPE_rot": …}
    depth_metrics(depth, true_depth)           # {"AbsRel": …, "delta1.25": …}
    cloud_metrics(points, true_points, umeyama(points[pairs], true_points[pairs]))

Cameras are extrinsics `[..., S, 3, 4]`, world to camera. A summary is the mean over leading dimensions, the scenes.
Everything is computed in double precision, on the device of its input.
"""

from vggt_compile.metrics.align import Similarity, align_cameras, umeyama
from vggt_compile.metrics.cloud import cloud_metrics, nearest_distances
from vggt_compile.metrics.depth import depth_metrics, depth_scale
from vggt_compile.metrics.poses import PoseErrors, accuracy, auc, pose_metrics, relative_pose_errors
from vggt_compile.metrics.trajectory import absolute_errors, relative_errors, trajectory_metrics

__all__ = [
    "PoseErrors",
    "Similarity",
    "absolute_errors",
    "accuracy",
    "align_cameras",
    "auc",
    "cloud_metrics",
    "depth_metrics",
    "depth_scale",
    "nearest_distances",
    "pose_metrics",
    "relative_errors",
    "relative_pose_errors",
    "trajectory_metrics",
    "umeyama",
]
