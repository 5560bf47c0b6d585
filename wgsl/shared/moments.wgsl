// Mean and variance of a row from those of its parts (Chan, Golub & LeVeque 1979), one part per invocation, in one round or in two where
// there are many. Moments of a part: one of its elements, the mean of the differences to it, the sum of squares around the mean, and the
// number of columns. Each part has an element of its own, and means meet as differences to the first element of the row, so that a large
// mean swallows no deviations, and an element far from the others only the digits that it needs.
{# Inside: an entry of `scratch` per invocation; lid - lane + k for k < lanes stays among those of a row. The first of `folded` of a row is
   lid / lanes * (lanes / fold), and it has lanes / fold. #}
{% macro combine(array, first, stride, count) %}
{% for k in range(count) %}
    let p{{ k }} = {{ array }}[{{ first }} + {{ k * stride }}u];
{% endfor %}
    let shift = p0.x;
{% for k in range(count) %}
    let m{{ k }} = (p{{ k }}.x - shift) + p{{ k }}.y;
{% endfor %}
    let n = {% for k in range(count) %}{{ " + " if k }}p{{ k }}.w{% endfor %};
    let mean = ({% for k in range(count) %}{{ " + " if k }}p{{ k }}.w * m{{ k }}{% endfor %}) / max(n, 1.0);
    var squares = 0.0;
{% for k in range(count) %}
    squares += p{{ k }}.z + p{{ k }}.w * (m{{ k }} - mean) * (m{{ k }} - mean);
{% endfor %}
{% endmacro %}
{% if lanes > 1 %}
{% set fold = 1 if lanes <= 16 else (8 if lanes <= 64 else 16) %}
var<workgroup> scratch: array<vec4<f32>, {{ size }}>;
{% if fold > 1 %}
var<workgroup> folded: array<vec4<f32>, {{ size // fold }}>;
{% endif %}

fn row_moments(part: vec4<f32>, lid: u32) -> vec4<f32> {
    let lane = lid % {{ lanes }}u;
    scratch[lid] = part;
    workgroupBarrier();
{% if fold > 1 %}
    let row = lid / {{ lanes }}u * {{ lanes // fold }}u;
    if (lane < {{ lanes // fold }}u) {
{{ combine("scratch", "lid", lanes // fold, fold) }}
        folded[row + lane] = vec4<f32>(shift, mean, squares, n);
    }
    workgroupBarrier();
{{ combine("folded", "row", 1, lanes // fold) }}
{% else %}
{{ combine("scratch", "lid - lane", 1, lanes) }}
{% endif %}
    return vec4<f32>(shift, mean, squares, n);
}
{% else %}
fn row_moments(part: vec4<f32>, lid: u32) -> vec4<f32> {
    return part;
}
{% endif %}

fn across(v: vec4<f32>) -> f32 {
    return (v.x + v.y) + (v.z + v.w);
}

// Ones for the columns of `vec4` number `col` that carry data, zeros for the others.
fn carried(col: u32) -> vec4<f32> {
    return select(vec4<f32>(), vec4<f32>(1.0), vec4<u32>(0u, 1u, 2u, 3u) + 4u * col < vec4<u32>({{ cols }}u));
}
