// Adds up the parts of a product whose K was split, in their order: an invocation a vec4 of the result.
{# Inside: `cell` keeps row and col inside the result; x has splits rows for each of its rows, read for col < used. #}
{% include "shared/group" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
{% include "shared/cell" %}

    var sum = vec4<f32>();
    if (col < {{ used }}u) {
        for (var part = 0u; part < {{ splits }}u; part++) {
            sum += x_load((part * {{ rows }}u + row) * x_stride + col);
        }
    }
    finish(row, col, sum);
}
