"""The map between stored parameters and the logical matrices that spectral steps act on."""
