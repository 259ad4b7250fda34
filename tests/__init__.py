"""No privilege, no waiting: pure logic, mirrors ckpt/."""
