fn group_id(wid: vec3<u32>) -> u32 {
    return wid.y * {{ grid_x }}u + wid.x;
}
