"""Where voxels lie: size, unit, origin and orientation, and what lies beyond a border."""
