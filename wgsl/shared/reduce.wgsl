// Adds up a vec4 over the `lanes` invocations of a row, in a fixed order.
{% if lanes > 1 %}
var<workgroup> scratch: array<vec4<f32>, {{ size }}>;

fn reduce(value: vec4<f32>, lid: u32) -> vec4<f32> {
    let lane = lid % {{ lanes }}u;
    workgroupBarrier();
    scratch[lid] = value;
    workgroupBarrier();
    for (var s = {{ lanes // 2 }}u; s > 0u; s = s >> 1u) {
        if (lane < s) {
            scratch[lid] = scratch[lid] + scratch[lid + s];
        }
        workgroupBarrier();
    }
    return scratch[lid - lane];
}
{% else %}
fn reduce(value: vec4<f32>, lid: u32) -> vec4<f32> {
    return value;
}
{% endif %}

fn across(v: vec4<f32>) -> f32 {
    return (v.x + v.y) + (v.z + v.w);
}

// The columns of `vec4` number `col` that carry data, the others replaced by zero.
fn tail(col: u32, v: vec4<f32>) -> vec4<f32> {
{% if cols % 4 == 0 %}
    return v;
{% else %}
    return select(vec4<f32>(), v, vec4<u32>(0u, 1u, 2u, 3u) + 4u * col < vec4<u32>({{ cols }}u));
{% endif %}
}
