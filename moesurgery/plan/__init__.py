"""The plan of an output checkpoint: its tensors as expressions, its config, its files, and the steps that made it.

Public: `plan.Plan`, `plan.plan_of`, `dequantise.dequantised`, `fingerprint.fingerprint`. Operations that change a plan
belong to `surgery`, what writes one to `write`.
"""
