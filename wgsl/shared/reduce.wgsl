// Adds up a vec4 over the `lanes` invocations of a row, in a fixed order: in one round, or in two where there are many, each of which
// waits for one barrier.
{% if lanes > 1 %}
{% set fold = 1 if lanes <= 16 else (8 if lanes <= 64 else 16) %}
var<workgroup> scratch: array<vec4<f32>, {{ size }}>;
{% if fold > 1 %}
var<workgroup> folded: array<vec4<f32>, {{ size // fold }}>;
{% endif %}

fn reduce(value: vec4<f32>, lid: u32) -> vec4<f32> {
    let lane = lid % {{ lanes }}u;
    workgroupBarrier();
    scratch[lid] = value;
    workgroupBarrier();
    var sum = vec4<f32>();
{% if fold > 1 %}
    let row = lid / {{ lanes }}u * {{ lanes // fold }}u;
    if (lane < {{ lanes // fold }}u) {
{% for k in range(fold) %}
        sum += scratch[lid + {{ k * (lanes // fold) }}u];
{% endfor %}
        folded[row + lane] = sum;
    }
    workgroupBarrier();
    sum = vec4<f32>();
{% for k in range(lanes // fold) %}
    sum += folded[row + {{ k }}u];
{% endfor %}
{% else %}
{% for k in range(lanes) %}
    sum += scratch[lid - lane + {{ k }}u];
{% endfor %}
{% endif %}
    return sum;
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
