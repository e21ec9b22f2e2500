"""Micro-measurements that calibrate, doctor and bench share: one device, the links between ranks, an exchange."""
